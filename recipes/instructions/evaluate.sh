#!/usr/bin/env bash
# IFEval of a seed of this recipe, greedily with 1,280 tokens, and what the training forgot. An interrupted evaluation goes on.
# Usage: recipes/instructions/evaluate.sh [IFEVAL_FILE] [SEED] [RUN_ROOT]   (IFEVAL_FILE: google/IFEval's 541 rows, as JSON Lines)
set -euo pipefail
ifeval=${1:-ifeval.jsonl}
seed=${2:-0}
root=${3:-runs/instructions}
here=$(dirname "$0")
dtype=float32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi
systems="stage=eval model=smollm2 'stage.systems={practised: ppo:practised-$seed, imitated: sft:imitated-$seed, base: base}' 'run.root=$root' dtype=$dtype rollout.temperature=0"

python "$here/probes.py" "$root/probes"
python -m align - <<STAGES
$systems run.name=forgetting-$seed "eval.tasks=[{name: texts, path: '$root/probes/texts.jsonl', probe: loss}, {name: sums, path: '$root/probes/sums.jsonl'}, {name: refusals, path: '$root/probes/refusals.jsonl'}]" rollout.max_new_tokens=100
$systems run.name=ifeval-$seed "eval.tasks=[{name: ifeval, path: '$ifeval'}]" rollout.max_new_tokens=1280
STAGES
python "$here/figures.py" "$root" "$ifeval" "$seed"
