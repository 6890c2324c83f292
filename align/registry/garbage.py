"""What nothing needs any more in a folder of runs: found with its size and the reason, and taken away where that is
asked for."""

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
from align.registry.index import Index, locked_inodes
from align.registry.record import Record, publication
from align.report.figure_text import align_columns, counted, one_line
from align.run.alias_log import AliasLog
from align.run.artifacts import REPLACED
from align.run.files import write_json
from align.run.folder import hold_lock
from align.run.weights import ABOUT

LOG = "removed.jsonl"
"""Beside the runs: what was taken away, a line each time."""
OTHER_LOG = f"Move {LOG} away: what is removed is noted there."
BY = "stage=registry stage.action=gc"
TRAINS = ("sft", "full", "dpo", "kto", "ppo", "reward")
WEIGHTS = (".safetensors", ".bin", ".gguf")
OWNED = re.compile(r"\.(?P<target>.+)\.(?:(?P<host>[^.]+(?:\.[^.]+)*)-)?(?P<pid>\d+)(?:-[0-9a-f]{8})?\.(?:part|old)")
"""The name of a file or a folder that is being written, with the process that writes it."""
UNOWNED = re.compile(r"\..+\.tmp|\.unfinished")
DAY_S = 86400.0
DEEPEST = 5
"""Folders below the root in which leftovers are looked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that nothing needs.

    Attributes:
        kind: `leftovers`, `checkpoints`, `bases` or `artifacts`, see docs/registry.md.
        path: relative to the folder of all runs; of an artifact its folder, whose weights are meant.
        bytes: that its removal frees.
        why: nothing needs it, in a clause.
        run: `stage:name` of the run that it lies in; empty elsewhere.
    """

    kind: str
    path: str
    bytes: int
    why: str
    run: str = ""


def find_garbage(index: Index, log: AliasLog, days: float) -> list[Piece]:
    """Return what nothing needs, the largest first within each kind: nothing that a run is at work in, that an alias
    meant at any time, that a run here was made from, or that an export has; no base and no artifact that changed within
    a day.

    Args:
        days: how long ago a run ended whose checkpoints are old.
    """
    root, now = index.root, time.time()
    records = index.records()
    meant = {arm.digest for change in log.changes for arm in change.arms}
    old = now - days * DAY_S
    kinds = (
        iter_leftovers(root, now),
        iter_checkpoints(root, records, old),
        iter_bases(root, now),
        iter_artifacts(root, records, meant, now),
    )
    return [piece for kind in kinds for piece in sorted(kind, key=lambda piece: (-piece.bytes, piece.path))]


def iter_leftovers(root: Path, now: float) -> Iterator[Piece]:
    """Yield what was being written when its process ended."""
    here, locks = gethostname(), locked_inodes() or set()
    for path in (path for name in (*WITH_RUNS, "bases", SWEEPS) for path in find_entries(root / name, is_hidden)):
        owned = OWNED.fullmatch(path.name)
        if owned is None and UNOWNED.fullmatch(path.name) is None:
            continue
        with suppress(OSError):
            aged = now - newest(path) > DAY_S
            ours = owned is not None and owned["host"] in (None, here)
            if ours and not Path("/proc", owned["pid"] if owned else "").exists():
                why = f"process {owned['pid'] if owned else ''} wrote it, and has ended"
            elif aged:
                why = "nothing has written to it for a day"
            else:
                continue
            stage, name, *inside = path.relative_to(root).parts
            run = f"{stage}:{name}" if inside and stage in WITH_RUNS else ""
            if not (run and os.stat(root / stage / name).st_ino in locks):
                yield Piece("leftovers", path.relative_to(root).as_posix(), size_of(path), why, run)


def find_entries(folder: Path, is_wanted: Callable[[os.DirEntry[str]], bool], depth: int = 0) -> Iterator[Path]:
    """Yield the entries below a folder that are wanted, without what lies in them. Links are not followed."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_wanted(entry):
                yield Path(entry.path)
            elif depth < DEEPEST and entry.is_dir(follow_symlinks=False):
                yield from find_entries(Path(entry.path), is_wanted, depth + 1)


def is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def iter_checkpoints(root: Path, records: Sequence[Record], before: float) -> Iterator[Piece]:
    """Yield the checkpoints of runs that are done, and of those that failed before a time."""
    for record in records:
        folder = root / record["folder"] / "checkpoints"
        if record["status"] == "running" or not folder.is_dir():
            continue
        ended = newest(folder)
        if record["status"] == "done":
            why = "its run is done"
        elif record["status"] in ("failed", "interrupted") and ended < before:
            why = f"its run was {record['status']} {(time.time() - ended) / DAY_S:.0f} days ago; it would begin anew"
        else:
            continue
        yield Piece("checkpoints", f"{record['folder']}/checkpoints", size_of(folder), why, record["run"])


def iter_bases(root: Path, now: float) -> Iterator[Piece]:
    """Yield the folders of bases in `bases/` that no export links to. A folder without `base.json` is not align's."""
    linked = {Path(os.path.realpath(link)) for link in find_entries(root / "export", os.DirEntry.is_symlink)}
    for path in sorted(about.parent for about in (root / "bases").glob(f"[!.]*/{ABOUT}")):
        real = Path(os.path.realpath(path))
        shared = any(os.stat(file).st_nlink > 1 for file in files_in(path))
        needed = shared or any(target == real or real in target.parents for target in linked)
        if not needed and now - newest(path) > DAY_S:
            why = "no export links to it; stage=export writes it again"
            yield Piece("bases", path.relative_to(root).as_posix(), size_of(path), why)


def iter_artifacts(root: Path, records: Sequence[Record], meant: set[str], now: float) -> Iterator[Piece]:
    """Yield the weights of done runs that no alias ever meant, that nothing but evaluations was made from, and that are
    not the newest of their stage on their base."""
    newest_of: dict[tuple[str, str], Record] = {}
    done = [record for record in records if record["status"] == "done" and record["stage"] in TRAINS]
    for record in done:
        place = (record["stage"], (record.get("base") or {}).get("digest", ""))
        if place not in newest_of or publication(record) > publication(newest_of[place]):
            newest_of[place] = record
    for record in done:
        latest = newest_of[record["stage"], (record.get("base") or {}).get("digest", "")]
        children = [ref for ref in record["children"] if not ref.startswith("eval:")]
        folder = root / record["folder"] / "artifact"
        weights = [path for path in files_in(folder) if path.suffix in WEIGHTS]
        if record is latest or children or record["digest"] in meant or not record["digest"] or not weights:
            continue
        if now - newest(folder) > DAY_S:
            why = f"{latest['run']} is later; no alias, no export and no run needs it"
            size = sum(path.stat().st_size for path in weights)
            yield Piece("artifacts", f"{record['folder']}/artifact", size, why, record["run"])


def files_in(path: Path) -> list[Path]:
    """Return the files of a folder; a file itself. Links are left out."""
    if not path.is_dir():
        return [path] if path.is_file() and not path.is_symlink() else []
    return [one for one in path.rglob("*") if one.is_file() and not one.is_symlink()]


def size_of(path: Path) -> int:
    """Return the bytes that its removal frees: what has another name elsewhere stays."""
    return sum(found.st_size for file in files_in(path) if (found := file.stat()).st_nlink == 1)


def newest(path: Path) -> float:
    """Return when something in it changed last, in seconds since 1970."""
    return max(os.lstat(one).st_mtime for one in [path, *files_in(path)])


def remove_pieces(root: Path, pieces: Sequence[Piece], who: str) -> Iterator[tuple[Piece, bool]]:
    """Remove pieces, and yield each with whether it could be; what a process works in stays. Each is written down
    first: a command that is cut off is continued by asking again.

    Args:
        who: for the log.

    Raises:
        OSError: the log cannot be written, or something cannot be removed.
    """
    for piece in pieces:
        path = root / piece.path
        try:
            with hold_lock(root / piece.run.replace(":", "/", 1)) if piece.run else nullcontext():
                write_to_log(root, piece, who)
                if piece.kind == "artifacts":
                    remove_weights(path, piece.why)
                elif path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            yield piece, True
        except RunBusy:
            yield piece, False


def write_to_log(root: Path, piece: Piece, who: str) -> None:
    """Write one line of the log: what goes, with the name and the size of each file."""
    refuse_foreign_log(root / LOG, "run.root", ("at", "who", "kind", "path"), OTHER_LOG)
    path = root / piece.path
    files = {one.relative_to(root).as_posix(): one.stat().st_size for one in files_in(path)}
    if piece.kind == "artifacts":
        files = {name: size for name, size in files.items() if name.endswith(WEIGHTS)}
    line = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "who": who, "kind": piece.kind, "path": piece.path,
            "run": piece.run, "why": piece.why, "files": files}  # fmt: skip
    with open(root / LOG, "a", encoding="utf-8", opener=open_regular) as file:
        file.write(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove_weights(artifact: Path, why: str) -> None:
    """Take the weights of an artifact away: first nobody reads it any more, then the files go."""
    write_json(artifact / REPLACED, {"by": BY, "at": datetime.now(UTC).isoformat(timespec="seconds"), "reason": why})
    for path in files_in(artifact):
        if path.suffix in WEIGHTS:
            path.unlink()


def as_lines(pieces: Sequence[Piece], taken: Mapping[str, bool] | None) -> Iterator[str]:
    """Yield what was found as text, or what became of it.

    Args:
        taken: path → whether it was removed; None where nothing was to be.
    """
    if not pieces:
        yield "nothing that nothing needs"
        return
    states = {None: "", True: "removed", False: "in use"}
    lines = [["kind", "size", "what", *([""] if taken is not None else []), "why"]]
    for piece in pieces:
        state = [states[taken.get(piece.path)]] if taken is not None else []
        what, why = one_line(piece.path), one_line(piece.why)
        lines.append([piece.kind, format_bytes(piece.bytes), what, *state, why])
    yield from align_columns(lines)
    total = format_bytes(sum(piece.bytes for piece in pieces))
    if taken is None:
        yield f"{counted(len(pieces), 'thing')}, {total}. Nothing was removed: stage.apply=true removes them."
        if any(piece.kind == "artifacts" for piece in pieces):
            yield 'Artifacts go only by name: "stage.kinds=[artifacts]".'
    else:
        freed = sum(piece.bytes for piece in pieces if taken.get(piece.path))
        yield f"{counted(sum(taken.values()), 'thing')} removed, {format_bytes(freed)}; {LOG} says which."


def format_bytes(count: int) -> str:
    """Return `12.3 MB`."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def as_objects(pieces: Sequence[Piece], taken: Mapping[str, bool] | None) -> list[dict[str, Any]]:
    return [asdict(piece) | {"removed": bool(taken and taken.get(piece.path))} for piece in pieces]
