"""Atomic writing and reading of JSON files, and recognition of full disks and exhausted memory."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, InputError, MissingArtifact, StorageError
from align.core.files import NotRegularFile, describe_read_error, has_file, read_text, shorten_for_message
from align.core.outputs import replace_file

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
FORBIDDEN = (errno.EACCES, errno.EPERM)
UNREADABLE = (errno.EIO, errno.ELOOP, errno.ENAMETOOLONG)
# Messages of libraries that raise errors without an errno: safetensors, torch, SQLite.
STORAGE_WORDS = re.compile(
    "No space left on device|Disk quota exceeded|File too large|Read-only file system|database or disk is full"
    r"|PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos"
)

MEMORY_WORDS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|Cannot allocate memory|std::bad_alloc|CUDA out of memory"
    r"|CU(DA|BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED|CUDA error: out of memory|posix_memalign failed"
    # oneDNN names no status. "a primitive descriptor" is its message for an unsupported operation.
    r"|could not create a (primitive|memory( object)?|scratchpad)\b(?! desc)|could not execute a primitive"
)


def read_json_object(path: Path, field: str, remedy: str) -> dict[str, Any]:
    """Read a JSON file whose top level must be an object, and return it as a dictionary.

    Raises:
        MissingArtifact: There is no such file.
        CorruptFile: The file cannot be read (see `align.core.files`) or does not hold an object.
    """
    text = read_text(path, field, remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON ({error})"
        raise CorruptFile(field, str(path), problem, remedy) from error
    if not isinstance(value, dict):
        raise CorruptFile(field, str(path), f"is a {type(value).__name__}, not an object", remedy)
    return value


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file into a dictionary, as `read_json_object` does, with the file's name as the field in errors.

    Raises:
        MissingArtifact: There is no such file.
        CorruptFile: The file does not hold an object.
    """
    if not has_file(path, path.name, remedy):
        raise MissingArtifact(path.name, str(path.parent), "the file is not there", remedy)
    return read_json_object(path, path.name, remedy)


def write_json(path: Path, value: Any) -> None:
    """Write a value to `path` atomically, as indented JSON with sorted keys.

    A reader, or a restart after a crash, sees the old file or the new one.
    """
    write_text(path, to_json_text(value))


def to_json_text(value: Any) -> str:
    """Return a value as indented JSON text with sorted keys and a final line break."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, and flush it to disk."""
    replace_file(path, text.encode("utf-8"))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception or one in its `__cause__` chain means that the GPU or the host is out of memory.

    torch's CPU allocator, oneDNN and C++ raise a plain `RuntimeError`, which only its text tells apart.
    """
    is_memory_error = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if is_memory_error or type(error).__name__ == "OutOfMemoryError" or MEMORY_WORDS.search(str(error)) is not None:
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def as_storage_error(error: BaseException, root: str) -> StorageError | None:
    """Return a StorageError if an exception comes from a full disk or an unusable file, or None for any other
    exception.

    The causes of the exception are searched only for a full disk.

    Args:
        root: the folder of runs, for the message.
    """
    if isinstance(error, OSError) and (error.errno in UNREADABLE or isinstance(error, NotRegularFile)):
        path = shorten_for_message(str(error.filename or root))
        return StorageError("file", path, describe_read_error(error), "Check the path, its links and its disk.")
    cause: BaseException | None = error
    while cause is not None:
        # The causes include errors that a library handled. Of these only a full disk counts.
        errnos = (*FULL, *FORBIDDEN) if cause is error else FULL
        if (isinstance(cause, OSError) and cause.errno in errnos) or STORAGE_WORDS.search(str(cause)):
            place = f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
            reason = (getattr(cause, "strerror", None) or str(cause)).strip().splitlines()[0]
            problem = f"a file cannot be written or read: {reason}{place}"
            remedy = "Free some space or change its permissions, then run the same command again to continue."
            return StorageError("run.root", root, problem, remedy)
        cause = cause.__cause__ or cause.__context__
    return None


def find_user_error(error: Exception, root: str) -> InputError | None:
    """Return an InputError with a remedy for an exception from lack of memory or disk space, or None for any other.

    A file that cannot be read or written counts as lack of disk space.

    Args:
        root: the folder of runs, for the message.
    """
    if is_out_of_memory(error):
        return InputError(
            "memory",
            type(error).__name__,
            "the device has too little for this run",
            "Lower stage.micro_batch, rollout.batch_size or data.max_length, or use method=qlora; stage=export holds a "
            "model in fp32: give it device=cpu.",
        )
    return as_storage_error(error, root)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a file, one JSON object per line, or write no file if there are no rows."""
    if text := "".join(f"{json.dumps(row)}\n" for row in rows):
        write_text(path, text)
