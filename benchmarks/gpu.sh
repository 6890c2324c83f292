#!/usr/bin/env bash
# One command for a CUDA machine, no network needed: PPO under NF4 at 0.5B, 1.5B and 7B, then every stage at 0.5B.
# Usage: benchmarks/gpu.sh [options of gpu.py and gpu_stages.py]
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
for script in gpu gpu_stages; do
  "${PYTHON:-python}" "benchmarks/$script.py" "$@"
done
