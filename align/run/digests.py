"""SHA-256 digests of files, folders and JSON values.

Digests of large files are cached while the files do not change.
"""

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
"""Size in bytes from which the digest of a file is cached. A smaller file is read each time, in milliseconds."""
SETTLED_S = 2.0
"""Seconds for which a file must have been unchanged before its digest is cached.

A second change within one tick of the file system's clock would leave the same times (Git calls such an entry racily
clean).
"""


class FileState(NamedTuple):
    """A file's inode, size and times from `os.stat`, which show whether its bytes may have changed.

    Writing moves `changed_ns` (ctime), which no program can set back, and another file in its place has another inode.
    The exception is a second write within one tick of the clock: see `is_settled`.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    def is_settled(self, now: float) -> bool:
        """Return True if the file last changed more than `SETTLED_S` before `now`, in seconds since the epoch."""
        return now - max(self.modified_ns, self.changed_ns) / 1e9 > SETTLED_S


class HashedFile(NamedTuple):
    """The SHA-256 of a file and its `os.stat` state when this process hashed it last.

    `settled` is the result of `FileState.is_settled`.
    """

    state: FileState
    sha256: str
    settled: bool


HASHED: dict[str, HashedFile] = {}
"""Real path → digest of each file that this process has hashed. A later load has to read the same bytes."""


def read_state(path: Path) -> FileState:
    status = os.stat(path)
    return FileState(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@contextmanager
def require_same_bytes(files: Sequence[Path], field: str, shown: str, digest: str = "") -> Iterator[None]:
    """Raise CorruptFile if `files` differ from their earlier digests, or change while the block reads them.

    The files' states before and after the block are compared. A file whose state does not prove it unchanged is hashed
    again.

    Args:
        field, shown: names of the files in a message.
        digest: the `files_digest` that the files must have. If it is empty, they must be what this process hashed
            before.

    Raises:
        CorruptFile: A file is not the one that was hashed, or changed while the block read it.
    """
    start_time = time.time()

    def refuse(path: Path, problem: str) -> NoReturn:
        raise CorruptFile(
            field, shown, f"{path.name} {problem}", "Wait until it is written, then run the command again."
        )

    states = {path: read_state(path) for path in files}
    digests: dict[Path, str] = {}
    for path, state in states.items():
        hashed = HASHED.get(os.path.realpath(path))
        if hashed is not None and hashed.settled and hashed.state == state:
            digests[path] = hashed.sha256
        elif hashed is not None or digest:
            digests[path] = hash_with_cache(path, state)  # HASHED keeps the first digest, which stays expected
        if hashed is not None and digests[path] != hashed.sha256:
            refuse(path, "changed after it was hashed")
    if digest and json_digest([[path.name, digests[path]] for path in files]) != digest:
        problem = f"is not what was hashed ({digest[:12]}): it changed, or another file lies there"
        raise CorruptFile(field, shown, problem, "Restore it, or run the command again to use what is there now.")
    yield
    for path, state in states.items():
        new_state = read_state(path)
        if new_state == state and (state.is_settled(start_time) or path not in digests):
            continue
        # A new hard link or other permissions move ctime alone, and so does a write that sets mtime back.
        same_but_ctime = new_state == state._replace(changed_ns=new_state.changed_ns)
        if not (same_but_ctime and path in digests and file_digest(path) == digests[path]):
            refuse(path, "changed while it was read")


def file_digest(path: Path) -> str:
    """Read a whole file and return its SHA-256 in hex, without the cache of `lookup_digest`.

    Raises:
        OSError: The file cannot be read or is not a regular file. The error names it.
    """
    try:
        with open_binary(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def lookup_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, for a large unchanged file from a cache on disk.

    A cached digest holds while path, inode, size and times stay the same.

    Writing to a file moves its change time (`ctime`), which no program can set back. To prove what lies on the disk, as
    for a published output, a receipt or a checkpoint, call `file_digest`.
    """
    start_time = time.time()
    state = read_state(path)
    digest = hash_with_cache(path, state)
    HASHED[os.path.realpath(path)] = HashedFile(state, digest, state.is_settled(start_time))
    return digest


def hash_with_cache(path: Path, state: FileState) -> str:
    """Return the SHA-256 of a file in hex, from the cache on disk if the file is large and was cached in this `state`.

    Otherwise hashes the file, and caches the digest of a large one.
    """
    folder = cache_folder()
    if state.size < LARGE or folder is None:
        return file_digest(path)
    entry_path = folder / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        entry = json.loads(read_text(entry_path, "digest"))
        if entry["state"] == list(state):
            return str(entry["sha256"])
    start_time = time.time()
    digest = file_digest(path)
    if read_state(path) == state and state.is_settled(start_time):
        with suppress(OSError):  # with a read-only home the file is hashed each time
            entry_path.parent.mkdir(parents=True, exist_ok=True)
            new_entry = {"path": str(path.resolve()), "state": state, "sha256": digest}
            replace_file(entry_path, json.dumps(new_entry).encode(), sync=False)
    return digest


def cache_folder() -> Path | None:
    """Return the path of the cache of file digests, or None if the user has no home.

    It is `$XDG_CACHE_HOME/align/digests` or `~/.cache/align/digests`.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align" / "digests"
    except RuntimeError:
        return None


def json_digest(value: Any) -> str:
    """Return the SHA-256 in hex of a value's JSON text with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_digest(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """Return the SHA-256 in hex over the names and contents of the files in a folder that match the glob `patterns`.

    The pattern `*` does not match files in subfolders.
    """
    return files_digest(match_files(folder, patterns))


def files_digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 in hex over the names and contents of files, in the order given."""
    return json_digest([[p.name, lookup_digest(p)] for p in files])


def match_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files in a folder that match at least one glob pattern, sorted by path, without subfolders.

    Raises:
        CorruptFile: A matching name is a pipe, a socket, a device or a broken link.
    """
    matches = {path for pattern in patterns for path in folder.glob(pattern)}
    matches = {path for path in matches if not path.is_dir() or path.name.endswith(READ_SUFFIXES)}
    return sorted(path for path in matches if has_file(path, path.name))
