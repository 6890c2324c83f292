"""Read files from users and strangers: regular files only, of a bounded size, with errors that name them.

A FIFO, a socket or a device would make a reader wait, or never end. A path is therefore checked before it is opened,
opened without waiting (`O_NONBLOCK`), and checked again by its descriptor, in case something else took its place in
between. Symbolic links are followed. All code that reads a file imports this module.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from io import BufferedReader
from pathlib import Path
from typing import TextIO

from align.core.errors import CorruptFile, InputError, MissingArtifact

MIB = 2**20
DEFAULT_MAX_FILE_MB = 512
"""The default of `run.max_file_mb`, in MiB. The largest tokenizer.json of a published model has about 35 MB."""
MAX_FOLDERS = 200
"""Maximum number of parts of a path, because creating nested folders recurses."""
MAX_PATH = 4096
"""PATH_MAX of Linux, in bytes, with the zero at its end."""
MAX_PART = 255
"""NAME_MAX of Linux file systems, in bytes."""
CHUNK = 2**20
READ_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors")
"""Endings of the files that transformers and PEFT open in a model's folder."""
LOADED_WHOLE = (
    "*config.json",
    "*.index.json",
    "*.jinja",
    "*.model",
    "*vocab*",
    "added_tokens.json",
    "byte_maps.json",
    "chat_template*",
    "dict.txt",
    "emoji.json",
    "merges.txt",
    "normalizer.json",
    "special_tokens_map.json",
    "tokenizer*",
    "word_pronunciation.json",
    "word_shape.json",
)
"""Patterns of file names that transformers and PEFT read whole: configurations, templates and tokenizer files."""
CHECK_PATH = "Check the path, and that you may read it."
KINDS = (
    (stat.S_ISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, "is a pipe (FIFO), not a file"),
    (stat.S_ISSOCK, "is a socket, not a file"),
    (stat.S_ISCHR, "is a device, not a file"),
    (stat.S_ISBLK, "is a device, not a file"),
)


class SizeLimit:
    """The maximum size of a file that is read whole, in MiB. It is set from `run.max_file_mb` when a command starts."""

    def __init__(self, megabytes: float) -> None:
        self.megabytes = megabytes

    @property
    def bytes(self) -> int:
        return int(self.megabytes * MIB)


SIZE_LIMIT = SizeLimit(DEFAULT_MAX_FILE_MB)


class NotRegularFile(OSError):
    """The error for a path that leads to something other than a regular file."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, str(path))


def parse_user_path(written_path: str | Path, field: str) -> Path:
    """Return a path that the user wrote, with `~` expanded, or raise InputError if it cannot be a path.

    Args:
        field: the setting that names the path, for errors.

    Raises:
        InputError: `~name` names no user of this machine, or the text cannot be a path.
    """
    text = str(written_path)
    remedy = "Give a shorter path."
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        user = text.partition("/")[0]
        problem = f"{user} names the home folder of a user that this machine does not have"
        raise InputError(field, text, problem, "Write the whole path, which begins with a slash.") from error
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise InputError(field, text, "is no path (it is not text in UTF-8)", "Write it in UTF-8.") from error
    if b"\0" in encoded:
        raise InputError(field, repr(text), "is no path (embedded null byte)", "Remove it.")
    if len(path.parts) > MAX_FOLDERS:
        problem = f"is no path (it goes through {len(path.parts):,} folders, and {MAX_FOLDERS} are the most)"
        raise InputError(field, shorten_for_message(text), problem, remedy)
    if len(encoded) >= MAX_PATH or any(len(os.fsencode(part)) > MAX_PART for part in path.parts):
        problem = f"is no path (File name too long: {MAX_PART} bytes a name and {MAX_PATH - 1:,} in all are the most)"
        raise InputError(field, shorten_for_message(text), problem, remedy)
    return path


def shorten_for_message(text: str) -> str:
    """Return a text for a message: over 120 characters, only its first 60 and last 30 with an ellipsis between."""
    return text if len(text) <= 120 else f"{text[:60]}…{text[-30:]}"


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file without blocking and return its descriptor, or raise NotRegularFile for a folder or a pipe.

    It can be the `opener` of the built-in `open`.

    Raises:
        NotRegularFile: the path leads to a folder, a pipe, a socket or a device.
        OSError: it cannot be opened.
    """
    try:
        refuse_irregular(path, os.stat(path).st_mode)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    try:
        refuse_irregular(path, os.fstat(descriptor).st_mode)
    except NotRegularFile:
        os.close(descriptor)
        raise
    return descriptor


def refuse_irregular(path: str | Path, mode: int) -> None:
    """Raise NotRegularFile unless `mode`, the `st_mode` of a path, is that of a regular file."""
    if not stat.S_ISREG(mode):
        problem = next((text for matches, text in KINDS if matches(mode)), "is no regular file")
        raise NotRegularFile(path, problem)


def open_binary(path: str | Path) -> BufferedReader:
    """Open a regular file of any size to read its bytes.

    Raises:
        NotRegularFile, OSError: as `open_regular`.
    """
    return open(path, "rb", opener=open_regular)


def open_text(path: str | Path, encoding: str = "utf-8", errors: str = "strict", newline: str | None = None) -> TextIO:
    """Open a regular file of any size to read its text, in UTF-8 by default.

    Raises:
        NotRegularFile, OSError: as `open_regular`.
    """
    return open(path, encoding=encoding, errors=errors, newline=newline, opener=open_regular)


def describe_read_error(error: OSError | ValueError) -> str:
    """Return the reason why a file cannot be read as a clause for a message, such as `there is no such file`."""
    if isinstance(error, NotRegularFile):
        return str(error.strerror)
    if isinstance(error, UnicodeError):
        return f"is not text in UTF-8 ({error})"
    if isinstance(error, ValueError):
        return f"is no path ({error})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        is_link = error.filename is not None and os.path.islink(error.filename)
        return "is a link to a file that is not there" if is_link else "there is no such file"
    if error.errno == errno.ELOOP:
        return "is a loop of links"
    return f"cannot be read ({error.strerror or error})"


def build_read_error(error: OSError | ValueError, path: Path, field: str, remedy: str) -> InputError:
    """Return the error for a file that cannot be read: `MissingArtifact` if it does not exist, else `CorruptFile`."""
    missing = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR)
    kind = MissingArtifact if missing else CorruptFile
    return kind(field, shorten_for_message(str(path)), describe_read_error(error), remedy)


@contextmanager
def convert_read_errors(field: str, remedy: str = CHECK_PATH) -> Iterator[None]:
    """Convert an OSError of the `with` block, which reads a file, to `MissingArtifact` or `CorruptFile`.

    Args:
        field: the setting that names the file.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise build_read_error(error, Path(error.filename or field), field, remedy) from error


def has_file(path: Path, field: str, remedy: str = CHECK_PATH) -> bool:
    """Return True if a path leads to a regular file, and False if it does not exist; raise InputError otherwise.

    Raises:
        InputError: the path leads to something else, or is a link to nowhere.
    """
    try:
        refuse_irregular(path, os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        absent = isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR)
        if absent and not os.path.islink(path):
            return False
        raise build_read_error(error, path, field, remedy) from error
    return True


def require_readable(path: Path, field: str, remedy: str = CHECK_PATH) -> None:
    """Raise InputError unless a path leads to a regular file whose first byte can be read."""
    try:
        with open_binary(path) as file:
            os.read(file.fileno(), 1)
    except (OSError, ValueError) as error:
        raise build_read_error(error, path, field, remedy) from error


def require_readable_folder(folder: Path, field: str, remedy: str = CHECK_PATH) -> None:
    """Raise InputError unless transformers and PEFT can read the model files in a folder, and none is too large.

    A library finds files by rules of its own, waits at a pipe without an end, and passes over a link to nowhere.
    The size limit applies to the names in `LOADED_WHOLE`: weights, and rows that lie beside them, may have any size.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(READ_SUFFIXES))
    except (OSError, ValueError) as error:
        raise build_read_error(error, folder, field, remedy) from error
    for name in names:
        path = folder / name
        require_readable(path, field, remedy)
        if any(fnmatchcase(name, pattern) for pattern in LOADED_WHOLE):
            refuse_large(path, os.stat(path).st_size, field)


def refuse_large(path: Path, size: int, field: str) -> None:
    """Raise CorruptFile if the size of a file, in bytes, is above the limit `run.max_file_mb`."""
    if size > SIZE_LIMIT.bytes:
        limit = f"{SIZE_LIMIT.megabytes:g}"
        problem = f"has {size / MIB:,.1f} MiB, and a file of this kind is read up to {limit} MiB"
        raise CorruptFile(field, shorten_for_message(str(path)), problem, "Check the path, or raise run.max_file_mb.")


def read_bytes(path: Path, field: str, remedy: str = CHECK_PATH) -> bytes:
    """Return the bytes of a regular file of at most `run.max_file_mb`.

    Args:
        field: the setting that names the file.
        remedy: the sentence of an error that says what to do.

    Raises:
        MissingArtifact: there is no such file.
        CorruptFile: it is no regular file, larger than `run.max_file_mb`, or cannot be read.
    """
    chunks = []
    total = 0
    try:
        descriptor = open_regular(path)
        try:
            refuse_large(path, os.fstat(descriptor).st_size, field)
            while chunk := os.read(descriptor, CHUNK):
                chunks.append(chunk)
                total += len(chunk)
                refuse_large(path, total, field)  # it may grow, and files of /proc state no size
        finally:
            os.close(descriptor)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise build_read_error(error, path, field, remedy) from error
    return b"".join(chunks)


def read_text(path: Path, field: str, remedy: str = CHECK_PATH, encoding: str = "utf-8") -> str:
    """Return the text of a UTF-8 file of at most `run.max_file_mb`, with its line breaks converted to `\\n`.

    Args:
        encoding: `utf-8-sig` passes over a byte order mark.

    Raises:
        MissingArtifact, CorruptFile: as `read_bytes`, or it is not UTF-8.
    """
    data = read_bytes(path, field, remedy)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise build_read_error(error, path, field, remedy) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
