"""Garbage collection in a folder of runs: list unneeded files with size and reason, and delete them on request."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Any

from align.config.stages import WITH_RUNS
from align.core.errors import RunBusy
from align.core.files import open_regular
from align.core.outputs import refuse_foreign_log
from align.registry.comparison import SWEEPS
from align.registry.index import Index, read_locked_inodes
from align.registry.record import Record, get_publication
from align.report.figure_text import align_columns, escape_unprintable, pluralize
from align.run.alias_log import AliasLog
from align.run.artifacts import REPLACED
from align.run.files import write_json
from align.run.folder import hold_lock
from align.run.weights import ABOUT

LOG = "removed.jsonl"
"""File beside the runs to which one line is appended for each file or folder that garbage collection removes."""
OTHER_LOG = f"Move {LOG} away: what is removed is noted there."
BY = "stage=registry stage.action=gc"
TRAINS = ("sft", "full", "dpo", "kto", "ppo", "reward")
WEIGHTS = (".safetensors", ".bin", ".gguf")
OWNED = re.compile(r"\.(?P<target>.+)\.(?:(?P<host>[^.]+(?:\.[^.]+)*)-)?(?P<pid>\d+)(?:-[0-9a-f]{8})?\.(?:part|old)")
"""Pattern of the name of a file or folder that is being written, with the host and id of the writing process."""
UNOWNED = re.compile(r"\..+\.tmp|\.unfinished")
DAY_S = 86400.0
DEEPEST = 5
"""Largest depth of nested folders, below a folder of one stage, at which leftovers are searched for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A file or folder that is not needed any more and may be deleted.

    Attributes:
        kind: `leftovers`, `checkpoints`, `bases` or `artifacts`, see docs/registry.md.
        path: path relative to the folder of all runs; for an artifact its folder, where only the weights are
            removed.
        bytes: space that its removal frees.
        why: why nothing needs it, as a clause.
        run: `stage:name` of the run that contains it; empty outside of runs.
    """

    kind: str
    path: str
    bytes: int
    why: str
    run: str = ""


def find_garbage(index: Index, log: AliasLog, days: float) -> list[Piece]:
    """Return the unneeded files and folders below the folder of runs, the largest first within each kind. Nothing is
    deleted.

    Not included is anything that a running run uses, that an alias ever referred to, that a run here was made from, or
    that an export contains, nor bases and artifacts that changed within a day.

    Args:
        log: the log of aliases.
        days: age in days at which checkpoints of an ended run count as old.
    """
    root = index.root
    now = time.time()
    records = index.records()
    alias_digests = {arm.digest for change in log.changes for arm in change.arms}
    kinds = (
        iter_leftovers(root, now),
        iter_unneeded_checkpoints(root, records, now - days * DAY_S),
        iter_unneeded_bases(root, now),
        iter_unneeded_weights(root, records, alias_digests, now),
    )
    return [piece for kind in kinds for piece in sorted(kind, key=lambda piece: (-piece.bytes, piece.path))]


def iter_leftovers(root: Path, now: float) -> Iterator[Piece]:
    """Yield unfinished files and folders whose writing process has ended, or which did not change for a day.

    Args:
        now: present time, in seconds since 1970.
    """
    host = gethostname()
    locks = read_locked_inodes() or set()
    for path in (
        path for name in (*WITH_RUNS, "bases", SWEEPS) for path in iter_matching_entries(root / name, is_hidden)
    ):
        owner = OWNED.fullmatch(path.name)
        if owner is None and UNOWNED.fullmatch(path.name) is None:
            continue
        with suppress(OSError):
            is_old = now - find_last_change(path) > DAY_S
            if owner is not None and owner["host"] in (None, host) and not Path("/proc", owner["pid"]).exists():
                why = f"process {owner['pid']} wrote it, and has ended"
            elif is_old:
                why = "nothing has written to it for a day"
            else:
                continue
            stage, name, *inner_parts = path.relative_to(root).parts
            run = f"{stage}:{name}" if inner_parts and stage in WITH_RUNS else ""
            if not (run and os.stat(root / stage / name).st_ino in locks):
                yield Piece("leftovers", path.relative_to(root).as_posix(), compute_size(path), why, run)


def iter_matching_entries(folder: Path, matches: Callable[[os.DirEntry[str]], bool], depth: int = 0) -> Iterator[Path]:
    """Yield the paths below a folder, up to `DEEPEST` levels deep, for which `matches` returns True, but nothing inside
    these.

    Links are not followed. Errors of the system end the search of a folder.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if matches(entry):
                yield Path(entry.path)
            elif depth < DEEPEST and entry.is_dir(follow_symlinks=False):
                yield from iter_matching_entries(Path(entry.path), matches, depth + 1)


def is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def iter_unneeded_checkpoints(root: Path, records: Sequence[Record], failed_before: float) -> Iterator[Piece]:
    """Yield the checkpoint folders of finished runs, and of failed or interrupted runs that changed before
    `failed_before`.

    Args:
        failed_before: time in seconds since 1970; later checkpoints of failed runs are left out.
    """
    for record in records:
        folder = root / record["folder"] / "checkpoints"
        if record["status"] == "running" or not folder.is_dir():
            continue
        changed_at = find_last_change(folder)
        if record["status"] == "done":
            why = "its run is done"
        elif record["status"] in ("failed", "interrupted") and changed_at < failed_before:
            days = (time.time() - changed_at) / DAY_S
            why = f"its run was {record['status']} {days:.0f} days ago; without them it would start from the beginning"
        else:
            continue
        yield Piece("checkpoints", f"{record['folder']}/checkpoints", compute_size(folder), why, record["run"])


def iter_unneeded_bases(root: Path, now: float) -> Iterator[Piece]:
    """Yield the folders of base weights in `bases/` that no export links to and that did not change for a day. A folder
    without `base.json` is left out.

    Args:
        now: present time, in seconds since 1970.
    """
    targets = {Path(os.path.realpath(link)) for link in iter_matching_entries(root / "export", os.DirEntry.is_symlink)}
    for path in sorted(file.parent for file in (root / "bases").glob(f"[!.]*/{ABOUT}")):
        real_path = Path(os.path.realpath(path))
        is_shared = any(os.stat(file).st_nlink > 1 for file in list_files(path))
        is_needed = is_shared or any(target == real_path or real_path in target.parents for target in targets)
        if not is_needed and now - find_last_change(path) > DAY_S:
            why = "no export links to it; stage=export writes it again"
            yield Piece("bases", path.relative_to(root).as_posix(), compute_size(path), why)


def iter_unneeded_weights(
    root: Path, records: Sequence[Record], alias_digests: set[str], now: float
) -> Iterator[Piece]:
    """Yield the artifacts of finished training runs that are superseded by a newer run and not used by anything.

    No alias ever referred to them, only evaluations were made from them, and they are not the newest of their stage on
    their base.

    Args:
        alias_digests: digests of all artifacts that an alias ever referred to.
        now: present time, in seconds since 1970.
    """
    newest_of: dict[tuple[str, str], Record] = {}
    trained = [record for record in records if record["status"] == "done" and record["stage"] in TRAINS]
    for record in trained:
        key = (record["stage"], (record.get("base") or {}).get("digest", ""))
        if key not in newest_of or get_publication(record) > get_publication(newest_of[key]):
            newest_of[key] = record
    for record in trained:
        latest = newest_of[record["stage"], (record.get("base") or {}).get("digest", "")]
        children = [ref for ref in record["children"] if not ref.startswith("eval:")]
        folder = root / record["folder"] / "artifact"
        weights = [path for path in list_files(folder) if path.suffix in WEIGHTS]
        if record is latest or children or record["digest"] in alias_digests or not record["digest"] or not weights:
            continue
        if now - find_last_change(folder) > DAY_S:
            why = f"{latest['run']} is later; no alias, no export and no run needs it"
            size = sum(path.stat().st_size for path in weights)
            yield Piece("artifacts", f"{record['folder']}/artifact", size, why, record["run"])


def list_files(path: Path) -> list[Path]:
    """Return all files below a folder, or a list of the path itself if it is a file. Links are left out."""
    if not path.is_dir():
        return [path] if path.is_file() and not path.is_symlink() else []
    return [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]


def compute_size(path: Path) -> int:
    """Return the number of bytes that deleting a file or folder frees. Files with other hard links are not counted."""
    return sum(status.st_size for status in map(os.stat, list_files(path)) if status.st_nlink == 1)


def find_last_change(path: Path) -> float:
    """Return the latest modification time of a folder and all files in it, in seconds since 1970."""
    return max(os.lstat(entry).st_mtime for entry in [path, *list_files(path)])


def remove_pieces(root: Path, pieces: Sequence[Piece], who: str) -> Iterator[tuple[Piece, bool]]:
    """Delete files and folders, and yield (piece, deleted) for each, where False means that the run is in use.

    Files of a running run stay. Each piece is logged before it is removed, so that an interrupted command can be
    repeated.

    Args:
        who: name for the log.

    Raises:
        OSError: The log cannot be written, or a piece cannot be removed.
    """
    for piece in pieces:
        path = root / piece.path
        try:
            with hold_lock(root / piece.run.replace(":", "/", 1)) if piece.run else nullcontext():
                append_to_removal_log(root, piece, who)
                if piece.kind == "artifacts":
                    remove_weights(path, piece.why)
                elif path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            yield piece, True
        except RunBusy:
            yield piece, False


def append_to_removal_log(root: Path, piece: Piece, who: str) -> None:
    """Append one JSON line to the log of removals, with the time, person, reason, and the name and size of each
    file."""
    refuse_foreign_log(root / LOG, "run.root", ("at", "who", "kind", "path"), OTHER_LOG)
    path = root / piece.path
    files = {file.relative_to(root).as_posix(): file.stat().st_size for file in list_files(path)}
    if piece.kind == "artifacts":
        files = {name: size for name, size in files.items() if name.endswith(WEIGHTS)}
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "who": who,
        "kind": piece.kind,
        "path": piece.path,
        "run": piece.run,
        "why": piece.why,
        "files": files,
    }
    with open(root / LOG, "a", encoding="utf-8", opener=open_regular) as file:
        file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove_weights(artifact: Path, why: str) -> None:
    """Delete the weights of an artifact, after marking it as removed, so that no command reads it any more."""
    write_json(artifact / REPLACED, {"by": BY, "at": datetime.now(UTC).isoformat(timespec="seconds"), "reason": why})
    for path in list_files(artifact):
        if path.suffix in WEIGHTS:
            path.unlink()


def as_lines(pieces: Sequence[Piece], removed: Mapping[str, bool] | None) -> Iterator[str]:
    """Yield a table of unneeded files and folders as lines of text, with whether each was removed, and a total.

    Args:
        removed: path → whether it was removed; None if nothing was to be removed.
    """
    if not pieces:
        yield "nothing of these kinds to remove"
        return
    states = {None: "", True: "removed", False: "in use"}
    lines = [["kind", "size", "what", *([""] if removed is not None else []), "why"]]
    for piece in pieces:
        state = [states[removed.get(piece.path)]] if removed is not None else []
        lines.append(
            [
                piece.kind,
                format_bytes(piece.bytes),
                escape_unprintable(piece.path),
                *state,
                escape_unprintable(piece.why),
            ]
        )
    yield from align_columns(lines)
    total = format_bytes(sum(piece.bytes for piece in pieces))
    if removed is None:
        yield f"{pluralize(len(pieces), 'thing')}, {total}. Nothing was removed: stage.apply=true removes them."
        if any(piece.kind == "artifacts" for piece in pieces):
            yield 'Artifacts go only by name: "stage.kinds=[artifacts]".'
    else:
        freed = sum(piece.bytes for piece in pieces if removed.get(piece.path))
        yield f"{pluralize(sum(removed.values()), 'thing')} removed, {format_bytes(freed)}; {LOG} says which."


def format_bytes(count: int) -> str:
    """Format a number of bytes with a decimal unit, such as `12.3 MB`."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def as_objects(pieces: Sequence[Piece], removed: Mapping[str, bool] | None) -> list[dict[str, Any]]:
    return [asdict(piece) | {"removed": bool(removed and removed.get(piece.path))} for piece in pieces]
