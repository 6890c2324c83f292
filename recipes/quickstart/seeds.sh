#!/usr/bin/env bash
# The quickstart with three seeds, each in its own folder of runs. Puts the figures of this processor into expected.json
# beside this script. Exits 1 where a seed fails or misses a bar. Usage: recipes/quickstart/seeds.sh [FOLDER]
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/quickstart-seeds}
status=0
for seed in 0 1 2; do
  "$here/run.sh" "$seed" "$folder/$seed" || status=1
  python "$here/../check.py" quickstart "$folder/$seed" "$seed" --save "$here/expected.json" > /dev/null || status=1
done
exit "$status"
