#!/bin/sh
# Makes an environment with Daft and Ray in the folder that is given, if there is none, and compares the engines in it
# (engines.py, which says what may follow).
set -eu
venv=${1:?names the folder of the environment}
shift
here=$(cd "$(dirname "$0")/../.." && pwd)
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  grep -vE '^(pyarrow|tqdm)==' "$here/constraints.txt" > "$venv/constraints.txt"
  "$venv/bin/pip" install --quiet "$here[daft,demo]" -c "$venv/constraints.txt"
fi
PYTHONPATH="$here" exec "$venv/bin/python" "$here/benchmarks/data/engines.py" "$@"
