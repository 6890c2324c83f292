"""Runs that are stale: made from something that was forgotten since. `stale.json` in the run's folder says so.

It is no part of what the run published: weights stay what they were, and a run that is made again in a new folder has
no such file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.run.files import json_object, write_json

FILE = "stale.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Stale:
    """Attributes:
    since: when it was marked first, ISO 8601 in UTC.
    because: why, in words.
    again: the command that makes it again; empty where there is none.
    receipts: the names of the receipts of whatever was forgotten, see `align.registry.receipts`.
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
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json_object(path, "stale", "Write the mark anew: stage=registry stage.action=forget.")
    except InputError:
        return Stale("an unknown time", f"{FILE} cannot be read")
    listed = found.get("receipts")
    receipts = tuple(map(str, listed)) if isinstance(listed, list) else ()
    return Stale(str(found.get("since")), str(found.get("because")), str(found.get("again") or ""), receipts)


def mark(folder: Path, because: str, again: str, receipt: str, at: str) -> None:
    """Say that a run is stale, durably. It was since it was marked first."""
    before = stale_in(folder)
    since, because, known = (before.since, before.because, before.receipts) if before else (at, because, ())
    write_json(folder / FILE, Stale(since, because, again, (*dict.fromkeys([*known, receipt]),)).as_json())
