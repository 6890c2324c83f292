"""Folders with a model that tests spoil, and what they are found to be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from align.models.base import find_base
from align.run import Base

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Trap:
    """Says so where somebody unpickles it."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


def found(folder: Path) -> Base:
    return find_base(str(folder))
