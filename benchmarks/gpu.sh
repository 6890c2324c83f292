#!/usr/bin/env bash
# One command for a CUDA machine, no network needed: PPO under NF4 at 0.5B, 1.5B and 7B, peak memory and samples a second.
# Usage: benchmarks/gpu.sh [options of gpu.py]
set -euo pipefail
cd "$(dirname "$0")/.."
HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
