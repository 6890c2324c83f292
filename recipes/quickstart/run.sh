#!/usr/bin/env bash
# Real dialogue in, an aligned QLoRA adapter out: offline, on two CPU cores, in minutes, on the built-in model.
# Usage: recipes/quickstart/run.sh [SEED] [RUN_ROOT]   (each seed in a root of its own: they would share a project)
# Each line below is one `python -m align` command; `-` runs them one after another and imports torch once.
set -euo pipefail
seed=${1:-0}
root=${2:-runs}
dtype=auto
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
common="seed=$seed 'run.root=$root' project=quickstart dtype=$dtype rollout.max_new_tokens=24"
# Items are called by the run that sampled them, and the simulated annotators' noise is drawn by the item: the name of that
# run is a part of the recipe. These are the names that the table was measured with; another seed has its derived name.
named="run.name=pocket-qlora-881b053d"
case "$seed" in
  0) ;;
  1) named="run.name=pocket-qlora-b9f0b200" ;;
  2) named="run.name=pocket-qlora-f85983a3" ;;
  *) named="" ;;
esac

python -m align - <<STAGES
$common stage=sft method.lr=2e-3 data.max_length=256 stage.max_steps=80
$common stage=sample stage.prompts=2200 rollout.batch_size=512 $named
$common stage=annotate stage.action=simulate stage.annotators=4
$common stage=reward data.allow_simulated=true stage.lr=5e-4 stage.epochs=2 stage.batch_size=8
$common stage=ppo stage.updates=44 stage.schedule=linear stage.epochs=1 stage.minibatches=4 stage.micro_batch=16 stage.lr=1e-3
$common stage=eval
$common stage=export
$common stage=export export=merged
STAGES
status=0
python "$(dirname "$0")/../check.py" quickstart "$root" "$seed" || status=$?
echo
echo "Rank the same answers yourself, in a browser: python -m align stage=annotate stage.demo=true project=quickstart 'run.root=$root'"
exit "$status"
