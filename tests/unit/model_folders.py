"""Copies of model folders for tests to damage, and the base that `find_base` reads from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from align.models.base import find_base
from align.run import Base

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Trap:
    """An object that creates the file `sprung` when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)


def copy_model(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def find_folder_base(folder: Path) -> Base:
    return find_base(str(folder))
