#!/usr/bin/env bash
# A reward model from people's preferences (Anthropic's HH, harmless-base; MIT) on SmolLM2-135M-Instruct, and TRL's
# RewardTrainer run plainly on the same pairs with the same settings. The text is offensive by nature: none is printed.
# Usage: recipes/hh/run.sh [FILE] [RUN_ROOT]     FILE: chosen/rejected transcripts, the hub's test file unless said
set -euo pipefail
file=${1:-hub:Anthropic/hh-rlhf/harmless-base/test.jsonl.gz}
root=${2:-runs/hh}

python -m align - <<STAGES
'run.root=$root' run.name=hh stage=reward init=base model=smollm2 method=lora dtype=bfloat16 data=files "data.path='$file'" data.held_out=0 data.limit=1500 data.max_length=1024 stage.held_out=0.2 stage.lr=3e-4 stage.micro_batch=2
STAGES
python "$(dirname "$0")/compare_with_trl.py" "$root/reward/hh"
