#!/usr/bin/env bash
# IFEval of this recipe's seeds, greedily with 1,280 tokens, and what the training forgot.
# The untouched model is asked once. An interrupted evaluation goes on when the command is repeated.
# Usage: recipes/instructions/evaluate.sh [RUN_ROOT] [SEED…]   (IFEVAL=FILE: google/IFEval's 541 rows as JSON Lines)
set -euo pipefail
source "$(dirname "$0")/settings.bash"
ifeval=${IFEVAL:-ifeval.jsonl}

python "$here/probes.py" "$root/probes"
python -m align - <<STAGES
$evaluation run.name=forgetting-$all_seeds "eval.tasks=[{name: texts, path: '$root/probes/texts.jsonl', probe: loss}, {name: sums, path: '$root/probes/sums.jsonl'}, {name: refusals, path: '$root/probes/refusals.jsonl'}]" rollout.max_new_tokens=100
$evaluation run.name=ifeval-$all_seeds "eval.tasks=[{name: ifeval, path: '$ifeval'}]" rollout.max_new_tokens=1280
STAGES
python "$here/figures.py" "$root" "$ifeval" "${seeds[@]}"
