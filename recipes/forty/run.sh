#!/usr/bin/env bash
# The loop through the browser: forty items ranked at the real page, a reward model of those votes, PPO, an adapter.
# Usage: recipes/forty/run.sh [SEED] [RUN_ROOT]   (it needs the extra `dev` and Chromium: `apt-get install chromium`)
# A script presses the keys (label.py); to press them yourself, run the lines of docs/recipes.md.
set -euo pipefail
seed=${1:-0}
root=${2:-runs/forty-$seed}
dtype=auto
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
common="seed=$seed 'run.root=$root' project=forty dtype=$dtype rollout.max_new_tokens=24"

python -m align - <<STAGES
$common stage=sft method.lr=2e-3 data.max_length=256 stage.max_steps=80
$common stage=sample stage.prompts=40
STAGES
python "$(dirname "$0")/label.py" forty "$root" "seed=$seed"
python -m align - <<STAGES
$common stage=reward data=annotations stage.epochs=16 stage.batch_size=8
$common stage=ppo stage.updates=20 stage.epochs=1 stage.minibatches=4 stage.micro_batch=16 stage.lr=1e-3
$common stage=eval
$common stage=export export=merged
STAGES
python "$(dirname "$0")/../check.py" forty "$root" "$seed"
