"""All text that is written below a folder, inside databases and columns too, for a search of it."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path


def settle() -> None:
    """Have wandb's own process end, which writes files behind our backs; a later run starts another."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def everything_in(folder: Path) -> dict[str, str]:
    """File → what it holds: its bytes and, of SQLite and Parquet, its rows, which may lie packed or cut in them."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        held = path.read_bytes()
        text = held.decode("latin-1")
        if held.startswith(b"SQLite format 3"):
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
                text += "\n".join(database.iterdump())
        elif held.startswith(b"PAR1"):
            from pyarrow.parquet import read_table

            text += str(read_table(path).to_pylist())
        found[str(path)] = text
    return found
