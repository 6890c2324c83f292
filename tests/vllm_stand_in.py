"""A virtual environment whose `vllm` is the stand-in of `stand_ins`, for tests of code that runs vLLM."""

from __future__ import annotations

import site
import subprocess
import sys
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


def stand_in_python(folder: Path) -> str:
    """Create a venv in `folder` whose `vllm` is that of `stand_ins`. Returns its `bin/python`."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    import_paths = [str(STAND_INS), *site.getsitepackages()]
    (packages / "stand_in.pth").write_text("\n".join(import_paths) + "\n")
    return str(folder / "bin" / "python")
