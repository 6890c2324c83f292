"""Runs that are stale: made from something that was forgotten since. `stale.json` in the run's folder says so.

It is no part of what the run published: weights stay what they were, and a run that is made again in a new folder has
no such file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import InputError
from align.run.files import json_object, write_json

FILE = "stale.json"
SCHEMA = 1
UNKNOWN = "an unknown time"


@dataclass(frozen=True, slots=True)
class Stale:
    """Attributes:
    since: when it was marked first, ISO 8601 in UTC.
    because: why, in words.
    again: the command that makes it again; empty where there is none.
    receipts: the names of the receipts of whatever was forgotten, see `align.registry.forgetting`.
    """

    since: str
    because: str
    again: str = ""
    receipts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA, "since": self.since, "because": self.because, "again": self.again,
            "receipts": list(self.receipts),
        }  # fmt: skip


def stale_in(folder: Path) -> Stale | None:
    """Since when a run is stale, and why; None of one that is not. One whose mark cannot be read is stale: somebody put
    the file there."""
    path, unread = folder / FILE, Stale(UNKNOWN, f"{FILE} cannot be read")
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # a pipe would keep its reader waiting
        return unread
    try:
        found = json_object(path, "stale", "")
    except InputError:
        return unread
    listed = found.get("receipts")
    receipts = tuple(map(str, listed)) if isinstance(listed, list) else ()
    since, because, again = (str(found.get(key) or "") for key in ("since", "because", "again"))
    return Stale(since or UNKNOWN, because or "nobody says why", again, receipts)


def mark(folder: Path, because: str, again: str, receipt: str, at: str) -> None:
    """Say that a run is stale, durably. It was since it was marked first."""
    before = stale_in(folder)
    since, because, known = (before.since, before.because, before.receipts) if before else (at, because, ())
    write_json(folder / FILE, Stale(since, because, again, (*dict.fromkeys([*known, receipt]),)).as_json())
