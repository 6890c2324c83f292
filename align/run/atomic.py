"""Folders that appear whole or not at all, whatever is written into them."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from uuid import uuid4

from align.core.errors import InputError, StorageError

AT_FDCWD = -100
RENAME_EXCHANGE = 2
WITHOUT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""What systems and file systems say that cannot exchange two names, such as macOS and NFS."""


@contextmanager
def publish(target: Path, replace: str = "") -> Iterator[Path]:
    """A new folder beside `target` that takes its name once the block ends without an error, and is removed otherwise.

    Args:
        target: where the folder shall be; an empty folder there is taken over.
        replace: the name of a file that every such folder of align's has: the new one takes the place of an older one,
            which stays until the new one is complete. Empty: it replaces none.

    Raises:
        InputError: `target` is a file, or holds files and is not one of those that may be replaced.
        StorageError: the folder cannot be written.
    """
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        problem = "is a link" if target.is_symlink() else "is a file"
        raise InputError("target", target.name, problem, "Choose a folder that does not exist yet.")
    own = replace and (target / replace).is_file()
    if target.is_dir() and any(target.iterdir()) and not own:
        raise InputError("target", target.name, "already holds files", "Choose another folder or remove it first.")
    with scratch_folder(target) as part:
        yield part
        with unwritable(target):
            moved(part, target)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder to work in, beside a target and on its disk, that is removed in the end; and with it what a process that
    was killed left for the same target.

    Raises:
        StorageError: the folder cannot be written.
    """
    here = f".{beside.name}.{gethostname()}-"
    for left in beside.parent.glob(f"{glob.escape(here)}*.part"):
        owner = left.name.removeprefix(here).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    part = beside.with_name(f"{here}{os.getpid()}-{uuid4().hex[:8]}.part")
    try:
        with unwritable(beside):
            part.mkdir(parents=True)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def moved(part: Path, target: Path) -> None:
    """Give a finished folder its name, in the place of what had it."""
    _sync(part)
    if not (target.is_dir() and any(target.iterdir())):
        os.replace(part, target)  # POSIX renames over an empty folder
        return
    old = part.with_suffix(".old")
    try:
        exchange(part, target)
        os.replace(part, old)
    except OSError as error:
        if error.errno not in WITHOUT_EXCHANGE:
            raise
        os.replace(target, old)
        os.replace(part, target)
    shutil.rmtree(old)


def exchange(one: Path, other: Path) -> None:
    """Exchange two names at once, so that a process that is killed leaves neither of them free.

    Raises:
        OSError: the file system or the system cannot do that (`WITHOUT_EXCHANGE`), or the names cannot be changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


@contextmanager
def unwritable(target: Path) -> Iterator[None]:
    """What the disk says against a folder, as the user's own error."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        remedy = "Free space, make it writable, or choose another folder."
        raise StorageError("target", str(target), problem, remedy) from error


def _sync(folder: Path) -> None:
    """Bytes on disk before the name that promises them; for others to read, which safetensors leaves to the owner."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644 if path.stat().st_nlink == 1 else 0o444)  # what others share is changed by none
            with path.open("rb") as file:
                os.fsync(file.fileno())
