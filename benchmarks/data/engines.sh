#!/bin/sh
# Make an environment with Daft and Ray in the given folder, unless it exists, and run engines.py in it with the other
# arguments.
set -eu
venv=${1:?the first argument is the folder of the environment}
shift
here=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  grep -vE '^(pyarrow|tqdm)==' "$here/constraints.txt" > "$venv/constraints.txt"
  "$venv/bin/pip" install --quiet "$here[daft,demo]" -c "$venv/constraints.txt"
fi
PYTHONPATH="$here" exec "$venv/bin/python" "$here/benchmarks/data/engines.py" "$@"
