#!/usr/bin/env bash
# IFEval of this recipe's seeds, greedily with 1,280 tokens, and what the training forgot. The untouched model is asked once.
# An interrupted evaluation goes on when the command is repeated.
# Usage: recipes/instructions/evaluate.sh [IFEVAL_FILE] [RUN_ROOT] [SEED…]   (IFEVAL_FILE: google/IFEval's 541 rows, as JSON Lines)
set -euo pipefail
ifeval=${1:-ifeval.jsonl}
root=${2:-runs/instructions}
seeds=("${@:3}")
seeds=("${seeds[@]:-0}")
here=$(dirname "$0")
name=$(IFS=-; echo "${seeds[*]}")
dtype=float32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi
systems="base: base"
for seed in "${seeds[@]}"; do systems="practised-$seed: ppo:practised-$seed, imitated-$seed: sft:imitated-$seed, $systems"; done
common="stage=eval model=smollm2 'stage.systems={$systems}' 'run.root=$root' dtype=$dtype rollout.temperature=0"

python "$here/probes.py" "$root/probes"
python -m align - <<STAGES
$common run.name=forgetting-$name "eval.tasks=[{name: texts, path: '$root/probes/texts.jsonl', probe: loss}, {name: sums, path: '$root/probes/sums.jsonl'}, {name: refusals, path: '$root/probes/refusals.jsonl'}]" rollout.max_new_tokens=100
$common run.name=ifeval-$name "eval.tasks=[{name: ifeval, path: '$ifeval'}]" rollout.max_new_tokens=1280
STAGES
python "$here/figures.py" "$root" "$ifeval" "${seeds[@]}"
