"""Atomic publication of folders: a folder appears complete or not at all."""

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
"""Error numbers on systems and file systems that cannot swap two names, such as macOS and NFS."""


@contextmanager
def publish_folder(target: Path, replace: str = "") -> Iterator[Path]:
    """Yield a temporary folder to write into, and rename it to `target` when the block ends without an error.

    After an error the temporary folder is removed and `target` stays as it was.

    Args:
        target: path of the finished folder. An empty folder there is replaced.
        replace: name of a file that marks a folder of this kind. A marked folder at `target` is replaced, and stays
            until the new one is complete. Empty: nothing is replaced.

    Raises:
        InputError: `target` is a file, or a folder with files that may not be replaced.
        StorageError: The folder cannot be written.
    """
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        problem = "is a link" if target.is_symlink() else "is a file"
        raise InputError("target", target.name, problem, "Choose a folder that does not exist yet.")
    may_replace = replace and (target / replace).is_file()
    if target.is_dir() and any(target.iterdir()) and not may_replace:
        raise InputError("target", target.name, "already holds files", "Choose another folder or remove it first.")
    with scratch_folder(target) as scratch:
        yield scratch
        with convert_os_errors(target):
            replace_folder(scratch, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`, on the same disk, and remove it when the block ends.

    Folders that killed processes left for the same target are removed first.

    Raises:
        StorageError: The folder cannot be written.
    """
    prefix = f".{target.name}.{gethostname()}-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*.part"):
        pid = leftover.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(leftover, ignore_errors=True)
    scratch = target.with_name(f"{prefix}{os.getpid()}-{uuid4().hex[:8]}.part")
    try:
        with convert_os_errors(target):
            scratch.mkdir(parents=True)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(scratch: Path, target: Path) -> None:
    """Flush the files of `scratch` to disk and rename it to `target`.

    An older folder there is swapped out and deleted.
    """
    _sync_files(scratch)
    if not (target.is_dir() and any(target.iterdir())):
        os.replace(scratch, target)  # POSIX renames over an empty folder
        return
    old = scratch.with_suffix(".old")
    try:
        exchange_names(scratch, target)
        os.replace(scratch, old)
    except OSError as error:
        if error.errno not in WITHOUT_EXCHANGE:
            raise
        os.replace(target, old)
        os.replace(scratch, target)
    shutil.rmtree(old)


def exchange_names(first: Path, second: Path) -> None:
    """Swap two paths in one system call, so that both exist at any time, even if the process is killed.

    Raises:
        OSError: The system or the file system does not support this (`WITHOUT_EXCHANGE`), or the names cannot be
            changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), ctypes.c_uint(RENAME_EXCHANGE)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))


@contextmanager
def convert_os_errors(target: Path) -> Iterator[None]:
    """Raise StorageError, with `target` as the folder in its message, in place of an OSError from the block."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        remedy = "Free space, make it writable, or choose another folder."
        raise StorageError("target", str(target), problem, remedy) from error


def _sync_files(folder: Path) -> None:
    """Make all files of a folder readable to every user, and flush each of them to disk with `fsync`.

    Files with several hard links become read-only.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            is_shared = path.stat().st_nlink > 1  # by a hard link: then nobody may change it
            path.chmod(0o444 if is_shared else 0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
