"""Whether the files of a run are those that it published: by size and time since they were last hashed, or by hashing
them now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from align.core.errors import InputError
from align.report.words import counted
from align.run.artifacts import check_not_replaced
from align.run.digests import file_digest

LATER_S = 60.0
"""A file that changed longer than this after its run ended was copied, or is another."""
NAMED = 3
"""Files that are named; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Hashed:
    """What a file was when it was hashed.

    Attributes:
        state: size, times and inode, see `state_of`.
        sha256: hex.
        at: when, ISO 8601 in UTC.
    """

    state: str
    sha256: str
    at: str


@dataclass(frozen=True, slots=True)
class Intact:
    """Attributes:
    whole: False where a file is missing, or is known not to be the one that was published.
    said: what is known, in a clause.
    hashed: the files that were hashed now, by their names in the run's folder.
    """

    whole: bool
    said: str
    hashed: Mapping[str, Hashed]


def state_of(path: Path) -> str:
    """Size, times and inode of a file: no program sets the change time back.

    Raises:
        OSError: it is not there.
    """
    found = os.stat(path)
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}"


def hashed_now(path: Path) -> Hashed | None:
    """A file as it is; None of one that is not there or cannot be read."""
    try:
        before = state_of(path)
        digest = file_digest(path)
        return (
            Hashed(before, digest, datetime.now(UTC).isoformat(timespec="seconds"))
            if state_of(path) == before
            else None
        )
    except OSError:
        return None


def looked_at(
    folder: Path, outputs: Mapping[str, str], known: Mapping[str, Hashed], finished: str | None, full: bool
) -> Intact:
    """Whether the published files of a run are what its manifest says.

    Args:
        outputs: file → sha256, of the manifest.
        known: what earlier looks hashed.
        finished: when the run ended, ISO 8601.
        full: hash all of them now.
    """
    try:
        check_not_replaced(folder / "artifact", "run")
    except InputError as error:
        return Intact(False, error.problem, {})
    now = {name: found for name in outputs if full and (found := hashed_now(folder / name))}
    missing, changed, unknown, later = [], [], [], []
    for name, digest in outputs.items():
        path = folder / name
        if not path.is_file():
            missing.append(name)
        elif full:
            if name not in now or now[name].sha256 != digest:
                changed.append(name)
        elif name in known and known[name].state == state_of(path):
            if known[name].sha256 != digest:
                changed.append(name)
        else:
            unknown.append(name)
            if is_later(path, finished):
                later.append(name)
    said = [f"{listed(missing)} missing" for _ in missing[:1]] + [f"{listed(changed)} changed" for _ in changed[:1]]
    if not missing and not changed:
        said.append(in_words(outputs, known, unknown, later, full))
    return Intact(not missing and not changed, "; ".join(said), now)


def in_words(
    outputs: Mapping[str, str], known: Mapping[str, Hashed], unknown: list[str], later: list[str], full: bool
) -> str:
    """What is known of files of which none is known to be another."""
    files = counted(len(outputs), "file")
    if not outputs:
        return "no files"
    if full:
        return f"{files} hashed now: as published"
    if unknown:
        newer = "; all of them" if len(later) == len(outputs) else f"; {listed(later).rpartition(' ')[0]}"
        copied = f"{newer} copied or written again after the run" if later else ""
        return f"{files}, {len(unknown):,} not hashed here yet{copied}"
    oldest = min(known[name].at for name in outputs)
    return f"{files}, size and time as when hashed on {oldest[:10]} {oldest[11:16]}"


def listed(names: list[str]) -> str:
    """The first names, the number of the others, and the verb."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'}"


def is_later(path: Path, finished: str | None) -> bool:
    try:
        ended = datetime.fromisoformat(str(finished))
    except ValueError:
        return False
    return os.stat(path).st_mtime > ended.timestamp() + LATER_S
