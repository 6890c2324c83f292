"""Digests: sha256 over files, folders and JSON values; those of large files are looked up where nothing has changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

LARGE = 8 * 2**20
"""Bytes; smaller files are read each time, which takes milliseconds."""
SETTLED_S = 2.0
"""A file that changed less than this ago is not remembered: a second change within one tick of the file system's clock
would leave the same times (Git calls such an entry racily clean)."""


def file_digest(path: Path) -> str:
    """sha256 of a file, hex, read from the disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_digest(path: Path) -> str:
    """sha256 of a file, hex; of a large one it is remembered while path, inode, size and times stay the same.

    Writing to a file moves its change time (`ctime`), which no program can set back. What is proven of the disk itself,
    as an output is published, in a receipt or a checkpoint, asks `file_digest`.
    """
    before = os.stat(path)
    if before.st_size < LARGE:
        return file_digest(path)
    state = [before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
    folder = cache_folder()
    if folder is None:
        return file_digest(path)
    entry = folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        remembered = json.loads(entry.read_text(encoding="utf-8"))
        if remembered["state"] == state:
            return str(remembered["sha256"])
    began = time.time()
    digest = file_digest(path)
    after = os.stat(path)
    settled = began - max(after.st_mtime, after.st_ctime) > SETTLED_S
    if settled and state == [after.st_dev, after.st_ino, after.st_size, after.st_mtime_ns, after.st_ctime_ns]:
        with suppress(OSError):  # a read-only home costs time, and nothing else
            entry.parent.mkdir(parents=True, exist_ok=True)
            part = entry.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps({"path": str(path.resolve()), "state": state, "sha256": digest}), "utf-8")
            part.replace(entry)
    return digest


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/align/digests`, or `~/.cache/align/digests`; None for a user who has no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "align" / "digests"
    except RuntimeError:
        return None


def json_digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_digest(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """sha256 over the names and contents of the files in `folder` that match `patterns`, hex."""
    return files_digest(matching(folder, patterns))


def files_digest(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, hex."""
    return json_digest([[p.name, known_digest(p)] for p in files])


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in `folder` that match a pattern, in order of their names."""
    return sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
