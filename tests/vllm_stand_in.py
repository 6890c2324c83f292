"""A Python that has a stand-in for vLLM: for tests of what asks it."""

from __future__ import annotations

import site
import subprocess
import sys
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


def stand_in_python(folder: Path) -> str:
    """`bin/python` of a venv in `folder`, whose `vllm` is the one of `stand_ins`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    places = [str(STAND_INS), *site.getsitepackages()]
    (packages / "stand_in.pth").write_text("\n".join(places) + "\n")
    return str(folder / "bin" / "python")
