"""The built-in chat model: where it lies, and that it is whole. `recipes/pocket` made it."""

from __future__ import annotations

import json
from pathlib import Path

from align.errors import CorruptFile
from align.run import file_digest

FOLDER = Path(__file__).resolve().parent / "pocket_model"


def pocket_folder() -> Path:
    """The folder of the built-in model.

    Raises:
        CorruptFile: a file is missing or is not the one that was shipped.
    """
    manifest = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    for name, digest in manifest["sha256"].items():
        path = FOLDER / name
        if not path.is_file() or file_digest(path) != digest:
            raise CorruptFile("model", str(path), "is not the file that was shipped", "Install the package again.")
    return FOLDER
