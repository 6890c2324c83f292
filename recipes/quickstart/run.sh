#!/usr/bin/env bash
# Real dialogue in, an aligned QLoRA adapter out: offline, on two CPU cores, in minutes, on the built-in model.
# Usage: recipes/quickstart/run.sh [SEED] [RUN_ROOT]   (each seed in a root of its own: they would share a project)
set -euo pipefail
seed=${1:-0}
root=${2:-runs}
align=(python -m align "seed=$seed" "run.root=$root" project=quickstart)

"${align[@]}" stage=sft method.lr=2e-3 data.max_length=256 stage.max_steps=80
"${align[@]}" stage=sample stage.prompts=2000 rollout.batch_size=256
"${align[@]}" stage=annotate stage.annotators=3
"${align[@]}" stage=reward data.allow_simulated=true stage.epochs=2 stage.batch_size=8
"${align[@]}" stage=ppo stage.updates=40 stage.epochs=1 stage.minibatches=4 stage.micro_batch=16 stage.lr=1e-3
"${align[@]}" stage=eval
"${align[@]}" stage=export
"${align[@]}" stage=export export=merged
python "$(dirname "$0")/check.py" "$root" "$seed"
