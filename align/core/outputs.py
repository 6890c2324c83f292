"""Write files atomically, without following links, and without replacing files that align did not write.

`open_atomic_file` and `replace_file` write. `refuse_foreign_file`, `refuse_foreign_database` and
`refuse_foreign_folder` are called first if a setting, the command line or the environment names the path.
`tests/unit/test_file_writes.py` lists every other call that writes, each with its reason. All code that writes a file
imports this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from socket import gethostname
from urllib.parse import quote
from uuid import uuid4

from align.core.errors import CorruptFile, InputError
from align.core.files import has_file, open_binary, read_bytes, read_text, require_readable

OTHER_FILE = "Name another file, or remove this one."
NOT_OURS = "there is a file that align did not write, or that was edited since"
SQLITE_HEADER = b"SQLite format 3\0"
FOLDER_SEAL = ".align.json"
"""Name of the file that `seal_folder` writes into a folder: the sha256 of every other file, by name."""


@contextmanager
def open_atomic_file(
    path: Path, mode: int = 0o666, replace: bool = True, sync: bool = True
) -> Iterator[BufferedWriter]:
    """Open a temporary file that is renamed to `path` when the `with` block ends without an error, else deleted.

    A reader or a crash sees the old file or the new one, never half. A link at the path is replaced and not followed.

    Args:
        mode: the rights of the file, less the umask.
        replace: take the place of a file that has the name.
        sync: have the bytes on disk before the name promises them.

    Raises:
        FileExistsError: something has the name, and `replace` is False.
        OSError: the file cannot be written.
    """
    # A name as that of a scratch folder: `stage.action=gc` finds those of processes that were killed.
    temporary = path.with_name(f".{path.name[:40]}.{gethostname()}-{os.getpid()}-{uuid4().hex[:8]}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)  # unlike a rename it replaces nothing
    finally:
        with suppress(OSError):
            temporary.unlink()


def replace_file(path: Path, data: bytes, mode: int = 0o666, sync: bool = True) -> None:
    """Write bytes to a new or existing file atomically: readers, and a crash, see the old contents or the new ones."""
    with open_atomic_file(path, mode, sync=sync) as file:
        file.write(data)


def refuse_foreign_file(path: Path, field: str, is_own: Callable[[bytes], bool], remedy: str = OTHER_FILE) -> None:
    """Raise InputError if a path exists, unless it is a regular file whose contents align wrote, as `is_own` decides.

    Args:
        field: the setting that names the path.
        is_own: returns whether contents are align's.
    """
    if has_file(path, field, remedy) and not is_own(read_bytes(path, field, remedy)):
        raise InputError(field, str(path), NOT_OURS, remedy)


def refuse_foreign_log(path: Path, field: str, keys: Collection[str], remedy: str) -> None:
    """Raise InputError if a log exists that align did not write: its first line is no JSON object with all `keys`.

    An empty file is accepted. Only the first line is read, because a log grows without a bound.
    """
    if not has_file(path, field, remedy):
        return
    require_readable(path, field, remedy)
    with open_binary(path) as file:
        line = file.readline(2**20)
    try:
        is_own = not line or set(keys) <= json.loads(line).keys()
    except (ValueError, AttributeError, RecursionError):
        is_own = False
    if not is_own:
        raise InputError(field, str(path), "there is a file that align did not write", remedy)


def refuse_foreign_database(
    path: Path, field: str, tables: Collection[str], remedy: str, displayed: str | None = None
) -> None:
    """Raise InputError if a file exists, unless it is a SQLite database with one of align's `tables`.

    An empty file and a database without tables are accepted. Nothing is changed: SQLite otherwise switches the journal
    of a database, or writes its log back, as it opens it.

    Args:
        tables: names of tables. A database of the kind has at least one of them.
        displayed: what to call the path in a message.

    Raises:
        CorruptFile: it is no SQLite database.
    """
    import sqlite3  # slow to import

    if not has_file(path, field, remedy):
        return
    require_readable(path, field, remedy)
    with open_binary(path) as file:
        header = file.read(len(SQLITE_HEADER))
    if not header:
        return
    if header != SQLITE_HEADER:
        raise CorruptFile(field, displayed or str(path), "is not a SQLite database", remedy)
    try:
        names = read_schema_names(path)
    except sqlite3.Error as error:
        problem = f"SQLite cannot read it ({error})"
        raise CorruptFile(field, displayed or str(path), problem, remedy) from error
    if names and not names & set(tables):
        problem = f"the database belongs to another program (it holds {min(names)})"
        raise InputError(field, displayed or str(path), problem, remedy)


def read_schema_names(path: Path) -> set[str]:
    """Return the names of the tables and views of a SQLite database, without changing it.

    A database whose tables are still in the write-ahead log beside it, or that is written at this moment, is read in a
    copy.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    import sqlite3

    def read(database_path: Path, options: str) -> set[str]:
        address = f"file:{quote(os.fsencode(database_path.absolute()))}?{options}"
        with closing(sqlite3.connect(address, uri=True)) as database:
            rows = database.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
        return {name for (name,) in rows}

    log = path.with_name(f"{path.name}-wal")
    has_log = log.is_file() and log.stat().st_size > 0
    with suppress(sqlite3.Error):
        names = read(path, "mode=ro&immutable=1")
        if names or not has_log:
            return names
    with tempfile.TemporaryDirectory(prefix="align-") as folder:
        copy = Path(folder, "copy.db")
        shutil.copyfile(path, copy)
        if has_log:
            shutil.copyfile(log, copy.with_name("copy.db-wal"))
        return read(copy, "mode=rw")


def seal_folder(folder: Path) -> None:
    """Write `.align.json` with the sha256 of every file into a folder, which marks the folder as written by align."""
    replace_file(folder / FOLDER_SEAL, json.dumps(hash_files(folder), indent=2, sort_keys=True).encode())


def refuse_foreign_folder(folder: Path, field: str, remedy: str) -> None:
    """Raise InputError if a path exists, unless it is a folder that is empty or unchanged since `seal_folder`."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(field, str(folder), "is a link or a file, not a folder that align made", remedy)
    digests = hash_files(folder)
    seal = folder / FOLDER_SEAL
    try:
        is_own = not digests or json.loads(read_text(seal, field, remedy)) == digests
    except (ValueError, RecursionError, InputError):
        is_own = False
    if not is_own:
        raise InputError(field, str(folder), "holds files that align did not write, or that were edited since", remedy)


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by relative path; an empty text for links and special files.

    Python's caches and the folder's `.align.json` are left out.
    """
    digests = {}
    for path in sorted(folder.rglob("*")):
        is_cache = path.suffix == ".pyc" and path.parent.name == "__pycache__"
        if is_cache or path == folder / FOLDER_SEAL or (path.is_dir() and not path.is_symlink()):
            continue
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file():
            digests[name] = ""
            continue
        with open_binary(path) as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def move_aside(path: Path) -> Path:
    """Rename a file to `NAME.<random digits>.aside` in the same folder, and return the new path."""
    new_path = path.with_name(f"{path.name}.{uuid4().hex[:8]}.aside")
    os.rename(path, new_path)
    return new_path
