#!/bin/sh
# An environment with datatrove and Daft, in the folder that is given. Daft asks for an older pyarrow than align's.
set -eu
venv=${1:?names the folder of the environment}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet "datatrove[processing]==0.10.1" "daft==0.7.26" orjson
DO_NOT_TRACK=1 "$venv/bin/python" -c "import daft, datatrove; print('Daft', daft.__version__)"
