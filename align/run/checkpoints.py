"""Checkpoints that can be trusted: each carries the hash of every file in it, written last of all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from align import ranks
from align.core.files import read_text
from align.run.digests import file_digest
from align.run.files import write_json
from align.run.folder import Run

SEAL = "align_seal.json"


def seal(folder: Path) -> None:
    """Write down the hash of every file of a checkpoint: one without a seal is a torn one."""
    write_json(folder / SEAL, {name: file_digest(folder / name) for name in sorted(names_in(folder))})


def names_in(folder: Path) -> set[str]:
    """Every file that a seal speaks of, by its place in the checkpoint."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != SEAL}


def sealed(folder: Path) -> bool:
    """Whether a checkpoint holds something, every file of it is the one that was written, and there is no other."""
    try:
        digests = json.loads(read_text(folder / SEAL, SEAL))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(digests, dict) or not digests:
        return False
    if names_in(folder) - digests.keys():
        return False
    return all((folder / name).is_file() and file_digest(folder / name) == d for name, d in digests.items())


def write_checkpoint(run: Run, step: int, write: Callable[[Path], None], keep: int) -> None:
    """Make checkpoint number `step`, which has its name only once it is whole, and remove all but the newest `keep`.
    The first rank does.

    Args:
        write: puts its files into the folder it is given.
    """
    if not ranks.is_main():
        return
    temporary = run.checkpoints / ".unfinished"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seal(temporary)
    final = run.checkpoints / f"checkpoint-{step}"
    shutil.rmtree(final, ignore_errors=True)  # of a run that was cut short behind it and continued before it
    temporary.replace(final)
    remove_old(run.checkpoints, keep)


def found_in(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints, newest first."""
    return sorted(checkpoints.glob("checkpoint-*"), key=step_of, reverse=True)


def remove_old(checkpoints: Path, keep: int, best: Path | None = None) -> None:
    """Remove all but the newest `keep`; the best, where it is older, stays in place of the oldest of these."""
    kept = found_in(checkpoints)[:keep]
    if best is not None and best not in kept:
        kept[-1] = best
    for old in found_in(checkpoints):
        if old not in kept:
            shutil.rmtree(old)


def beside(checkpoint: Path, step: int) -> Path:
    """The folder of another checkpoint of the same run."""
    return checkpoint.with_name(f"checkpoint-{step}")


def newest_checkpoint(
    run: Run, say: Callable[[str], None] = print, whole: Callable[[Path], bool] = sealed
) -> Path | None:
    """The newest checkpoint that is whole; torn or altered ones are named, removed and passed over. All ranks have the
    one that the first rank has found.

    Args:
        whole: whether a checkpoint can be continued from.
    """
    found = newest_whole(run, say, whole) if ranks.is_main() else None
    return ranks.broadcast(found.absolute() if found and not ranks.is_alone() else found)


def newest_whole(run: Run, say: Callable[[str], None], whole: Callable[[Path], bool]) -> Path | None:
    if not run.resumed:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        return None
    for folder in found_in(run.checkpoints):
        if whole(folder):
            say(f"continuing from {folder.name}")
            return folder
        say(f"{folder.name} is torn or altered: passed over")
        shutil.rmtree(folder)
    return None


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
