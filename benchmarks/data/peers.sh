#!/bin/sh
# Make an environment with datatrove and Daft in the given folder. Daft needs an older pyarrow than align.
set -eu
venv=${1:?the first argument is the folder of the new environment}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet "datatrove[processing]==0.10.1" "daft==0.7.26" orjson
DO_NOT_TRACK=1 "$venv/bin/python" -c "import daft, datatrove; print('Daft', daft.__version__)"
