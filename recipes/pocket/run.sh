#!/usr/bin/env bash
# Make the built-in model again: tokenizer, random weights, training by `stage=full`, packaging.
# About 70 minutes of one core. Usage: recipes/pocket/run.sh [BUILD_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-runs/pocket}
[ -d "$build/start" ] || python recipes/pocket/prepare.py "$build/start"
python -m align stage=full model=hub "model.path=$build/start" data.part=base data.max_length=256 \
  method.lr=1e-3 stage.epochs=2 stage.batch_size=16 stage.micro_batch=16 stage.weight_decay=0.1 \
  stage.eval_size=100 run.name=pocket "run.root=$build/runs"
python recipes/pocket/package.py "$build/runs/full/pocket" align/models/pocket_model
