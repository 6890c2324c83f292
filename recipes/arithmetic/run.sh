#!/usr/bin/env bash
# Arithmetic by an exact checker: a few sums to imitate, GRPO on others, measured on sums that nothing was trained on.
# Usage: recipes/arithmetic/run.sh [SEED] [RUN_ROOT]
set -euo pipefail
seed=${1:-0}
root=${2:-runs/arithmetic-$seed}
dtype=auto
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
common="seed=$seed 'run.root=$root' dtype=$dtype rollout.max_new_tokens=6"

python "$(dirname "$0")/prepare.py" "$root/sums" "$seed"
status=0
python -m align - <<STAGES || status=$?
$common stage=full model=pocket data=files 'data.path=$root/sums/taught.jsonl' data.held_out=0 data.max_length=32 stage.lr=1e-3 stage.schedule=constant stage.max_steps=85 stage.epochs=100 stage.batch_size=32 stage.micro_batch=32
$common stage=ppo init=full:latest method=full data=files 'data.path=$root/sums/practised.jsonl' data.held_out=0 data.max_length=64 reward=check stage.advantage=grpo stage.group_size=8 stage.normalise=off stage.score_scale=1 stage.kl_coef=0.01 stage.updates=60 stage.batch_size=128 stage.micro_batch=64 stage.epochs=1 stage.minibatches=2 stage.lr=2e-4 stage.warmup=0.1 stage.tripwires.entropy=null
$common stage=eval "stage.systems={practised: ppo:latest, taught: full:latest}" "eval.tasks=[{name: sums, path: '$root/sums/held_out.jsonl'}]" "eval.gates=[{name: learns, task: sums, against: taught, is: superior, margin: 0.1}]"
STAGES
python "$(dirname "$0")/figures.py" "$root"
exit "$status"  # 3 where the gate is not passed: the second stage did not learn
