#!/usr/bin/env bash
# The quickstart with three seeds, each in its own folder of runs; writes expected.json beside this script.
# Usage: recipes/quickstart/seeds.sh [FOLDER]
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/quickstart-seeds}
for seed in 0 1 2; do
  "$here/run.sh" "$seed" "$folder/$seed" || true
  python "$here/check.py" "$folder/$seed" "$seed" --save "$here/expected.json"
done
