#!/usr/bin/env bash
# The demo with the seeds that its result is reported for (measured: 0 1 2), or with those that its settings were chosen by
# (tuning: 11 to 15), each in a folder of runs of its own. Then seeds.py compares them with the bars.
# Exits 1 if a run fails or a bar is missed.
# Usage: recipes/demo/seeds.sh [measured|tuning] [FOLDER]
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
questions=${1:-measured}
folder=${2:-runs/demo-$questions}
seeds="0 1 2"
if [ "$questions" = tuning ]; then seeds="11 12 13 14 15"; fi
for seed in $seeds; do
  root="$folder/$seed"
  rm -f "$root/figures.json"
  "$here/run.sh" "$seed" "$root" "$questions" || [ $? = 3 ] || exit 1  # 3: a guard is missed, which seeds.py reports
  python "$here/guards.py" "$root" --topic --save "$root/figures.json" || [ $? = 3 ] || exit 1
done
python "$here/seeds.py" "$questions" "$folder"
