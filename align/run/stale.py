"""Stale runs: runs that were trained on data that has been deleted since. Each has a `stale.json` in its folder.

The file is not part of what the run published: the weights do not change. A run that is repeated in a new folder has no
such file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import InputError
from align.run.files import read_json_object, write_json

FILE = "stale.json"
SCHEMA = 1
UNKNOWN = "an unknown time"


@dataclass(frozen=True, slots=True)
class StaleMark:
    """The content of `stale.json`, which marks a run as trained on data that was deleted later.

    Attributes:
        since: when the run was first marked, ISO 8601 in UTC.
        because: the reason, as a sentence.
        again: the command that repeats the run; may be empty.
        receipts: names of the deletion receipts, see `align.registry.forgetting`.
    """

    since: str
    because: str
    again: str = ""
    receipts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA,
            "since": self.since,
            "because": self.because,
            "again": self.again,
            "receipts": list(self.receipts),
        }


def read_stale_mark(folder: Path) -> StaleMark | None:
    """Read `stale.json` in a run's folder, or return None if there is no such file, so that the run is not stale.

    A run whose file cannot be read counts as stale.
    """
    path = folder / FILE
    unreadable = StaleMark(UNKNOWN, f"{FILE} cannot be read")
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # reading a pipe would block
        return unreadable
    try:
        values = read_json_object(path, "stale", "")
    except InputError:
        return unreadable
    receipts = values.get("receipts")
    return StaleMark(
        since=str(values.get("since") or UNKNOWN),
        because=str(values.get("because") or "no reason is recorded"),
        again=str(values.get("again") or ""),
        receipts=tuple(map(str, receipts)) if isinstance(receipts, list) else (),
    )


def mark_stale(folder: Path, reason: str, command: str, receipt: str, at: str) -> None:
    """Write `stale.json` into the folder of a run whose training data was deleted, or add `receipt` to an older one.

    The time and reason of an older one stay.
    """
    old = read_stale_mark(folder) or StaleMark(at, reason)
    receipts = tuple(dict.fromkeys([*old.receipts, receipt]))
    write_json(folder / FILE, StaleMark(old.since, old.because, command, receipts).as_json())
