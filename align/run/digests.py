"""Digests: sha256 over files, folders and JSON values; those of large files are looked up where nothing has changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from align.core.errors import CorruptFile
from align.core.files import READ_SUFFIXES, has_file, open_binary, read_text
from align.core.outputs import replace_file

LARGE = 8 * 2**20
"""Bytes; smaller files are read each time, which takes milliseconds."""
SETTLED_S = 2.0
"""A file that changed less than this ago is not remembered: a second change within one tick of the file system's clock
would leave the same times (Git calls such an entry racily clean)."""


class FileState(NamedTuple):
    """A file as its file system describes it: while all of this stays the same, so do its bytes.

    Writing moves `changed_ns` (ctime), which no program can set back, and another file in its place has another inode.
    The exception is a second write within one tick of the clock: see `is_settled`.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    def is_settled(self, now: float) -> bool:
        """Return True if the file had not changed for `SETTLED_S` at a time."""
        return now - max(self.modified_ns, self.changed_ns) / 1e9 > SETTLED_S


class Hashed(NamedTuple):
    """A file as this process hashed it last. `settled`: see `FileState.is_settled`."""

    state: FileState
    sha256: str
    settled: bool


HASHED: dict[str, Hashed] = {}
"""Real path → a file that this process has hashed: what is loaded later has to be that."""


def state_of(path: Path) -> FileState:
    """Return the state of a file, links followed."""
    found = os.stat(path)
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def same_bytes(files: Sequence[Path], field: str, shown: str, digest: str = "") -> Iterator[None]:
    """Make sure that the bytes which the block reads are those that were hashed.

    The states of the files before and after the block tell; a file is hashed again where they do not.

    Args:
        field, shown: what to call the files in a message.
        digest: the `files_digest` that they must have. Empty: what this process has hashed before has to be the same.

    Raises:
        CorruptFile: a file is another than was hashed, or changed while the block read it.
    """
    began = time.time()

    def refuse(path: Path, problem: str) -> NoReturn:
        raise CorruptFile(
            field, shown, f"{path.name} {problem}", "Wait until it is written, then run the command again."
        )

    before = {path: state_of(path) for path in files}
    known: dict[Path, str] = {}
    for path, state in before.items():
        hashed = HASHED.get(os.path.realpath(path))
        if hashed is not None and hashed.settled and hashed.state == state:
            known[path] = hashed.sha256
        elif hashed is not None or digest:
            known[path] = recall_digest(path, state)  # and what was hashed before stays what is expected
        if hashed is not None and known[path] != hashed.sha256:
            refuse(path, "changed after it was hashed")
    if digest and json_digest([[path.name, known[path]] for path in files]) != digest:
        problem = f"is not what was hashed ({digest[:12]}): it changed, or another file lies there"
        raise CorruptFile(field, shown, problem, "Restore it, or run the command again to use what is there now.")
    yield
    for path, state in before.items():
        after = state_of(path)
        if after == state and (state.is_settled(began) or path not in known):
            continue
        # A link to it or other rights move ctime alone, and so does a write whose modification time is set back.
        same_but_ctime = after == state._replace(changed_ns=after.changed_ns)
        if not (same_but_ctime and path in known and file_digest(path) == known[path]):
            refuse(path, "changed while it was read")


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, hex, read from the disk.

    Raises:
        OSError: it cannot be read, or is no regular file. The error names it.
    """
    try:
        with open_binary(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def known_digest(path: Path) -> str:
    """sha256 of a file, hex; of a large one it is remembered while path, inode, size and times stay the same.

    Writing to a file moves its change time (`ctime`), which no program can set back. What is proven of the disk itself,
    as an output is published, in a receipt or a checkpoint, asks `file_digest`.
    """
    began = time.time()
    state = state_of(path)
    digest = recall_digest(path, state)
    HASHED[os.path.realpath(path)] = Hashed(state, digest, state.is_settled(began))
    return digest


def recall_digest(path: Path, state: FileState) -> str:
    """Return the sha256 of a file in a state, from the cache if it is large and has been hashed in that state."""
    folder = cache_folder()
    if state.size < LARGE or folder is None:
        return file_digest(path)
    entry = folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        remembered = json.loads(read_text(entry, "digest"))
        if remembered["state"] == list(state):
            return str(remembered["sha256"])
    began = time.time()
    digest = file_digest(path)
    if state_of(path) == state and state.is_settled(began):
        with suppress(OSError):  # a read-only home costs time, and nothing else
            entry.parent.mkdir(parents=True, exist_ok=True)
            value = {"path": str(path.resolve()), "state": state, "sha256": digest}
            replace_file(entry, json.dumps(value).encode(), sync=False)
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
    """Return the files in a folder that match a pattern, in order of their names. Folders are left out.

    Raises:
        CorruptFile: a name that matches is a pipe, a socket, a device, or a link that leads nowhere.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    found = {path for path in found if not path.is_dir() or path.name.endswith(READ_SUFFIXES)}
    return sorted(path for path in found if has_file(path, path.name))
