"""Verified checkpoints: each contains a file with the hashes of all its files, written last."""

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


def seal_checkpoint(folder: Path) -> None:
    """Write `align_seal.json` into a checkpoint, with the SHA-256 of every other file.

    A checkpoint without this file is incomplete.
    """
    write_json(folder / SEAL, {name: file_digest(folder / name) for name in sorted(list_relative_files(folder))})


def list_relative_files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != SEAL}


def is_intact(folder: Path) -> bool:
    """Return whether a checkpoint holds exactly the files that `align_seal.json` lists, with the same SHA-256."""
    try:
        digests = json.loads(read_text(folder / SEAL, SEAL))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(digests, dict) or not digests or list_relative_files(folder) - digests.keys():
        return False
    return all((folder / name).is_file() and file_digest(folder / name) == digest for name, digest in digests.items())


def write_checkpoint(run: Run, step: int, write: Callable[[Path], None], keep_count: int) -> None:
    """Write the checkpoint of step `step` atomically, then delete all but the newest `keep_count`. Only rank 0 writes.

    Args:
        write: writes the checkpoint's files into the folder it receives.
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
    seal_checkpoint(temporary)
    final = run.checkpoints / f"checkpoint-{step}"
    shutil.rmtree(final, ignore_errors=True)  # left by a run that resumed from an earlier checkpoint
    temporary.replace(final)
    remove_old_checkpoints(run.checkpoints, keep_count)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the paths of the `checkpoint-STEP` folders, highest step first."""
    return sorted(checkpoints.glob("checkpoint-*"), key=parse_step, reverse=True)


def remove_old_checkpoints(checkpoints: Path, keep_count: int, best: Path | None = None) -> None:
    """Delete all but the newest `keep_count` checkpoints, but never the checkpoint `best`.

    If `best` is older than these, it is kept in place of the oldest of them.
    """
    retained = list_checkpoints(checkpoints)[:keep_count]
    if best is not None and best not in retained:
        retained[-1] = best
    for folder in list_checkpoints(checkpoints):
        if folder not in retained:
            shutil.rmtree(folder)


def sibling_checkpoint(checkpoint: Path, step: int) -> Path:
    """Return the path of the checkpoint of step `step` beside another checkpoint of the same run."""
    return checkpoint.with_name(f"checkpoint-{step}")


def remove_unusable_and_find_newest(
    run: Run, report: Callable[[str], None] = print, is_usable: Callable[[Path], bool] = is_intact
) -> Path | None:
    """Delete damaged checkpoints until an intact one is the newest, and return that one, or None if none is left.

    Rank 0 chooses for all ranks. If the run is not resumed, all of its checkpoints are deleted.

    Args:
        report: prints a line.
        is_usable: return whether a checkpoint can be resumed from.
    """
    checkpoint = remove_unusable_checkpoints(run, report, is_usable) if ranks.is_main() else None
    return ranks.broadcast(checkpoint.absolute() if checkpoint and not ranks.is_alone() else checkpoint)


def remove_unusable_checkpoints(
    run: Run, report: Callable[[str], None], is_usable: Callable[[Path], bool]
) -> Path | None:
    if not run.resumed:
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        return None
    for folder in list_checkpoints(run.checkpoints):
        if is_usable(folder):
            report(f"continuing from {folder.name}")
            return folder
        report(f"{folder.name} cannot be resumed from and is removed")
        shutil.rmtree(folder)
    return None


def parse_step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
