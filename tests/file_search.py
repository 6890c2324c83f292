"""Read all text of the files below a folder, with the rows of SQLite and Parquet files, to search it."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path


def stop_wandb() -> None:
    """End the background process of wandb, which still writes files. A later run starts a new one."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def read_all_text(folder: Path) -> dict[str, str]:
    """Read all files below a folder. Returns path → text: the file's bytes and, of SQLite and Parquet, its rows too,
    which may be compressed or split in the bytes."""
    texts = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        text = content.decode("latin-1")
        if content.startswith(b"SQLite format 3"):
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
                text += "\n".join(database.iterdump())
        elif content.startswith(b"PAR1"):
            from pyarrow.parquet import read_table

            text += str(read_table(path).to_pylist())
        texts[str(path)] = text
    return texts
