"""Odd files by kind: how to make one at a path, and the error that a reader gives."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from align.core.files import SIZE_LIMIT

SOON_S = 20
"""A reader that has not ended by then hangs."""


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have about 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SIZE_LIMIT.bytes + 1)


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (lambda path: path.mkdir(), "is a folder, not a file|is a folder without a file"),
    "fifo": (lambda path: os.mkfifo(path), r"is a pipe \(FIFO\), not a file"),
    "socket": (make_socket, "is a socket, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a link to a file that is not there"),
    "loop": (lambda path: path.symlink_to(path.name), "is a loop of links"),
    "eio": (lambda path: path.symlink_to("/proc/self/mem"), r"Input/output error"),
}
"""Kind → what makes it, and what an error says of it; those that no file can be."""


@contextmanager
def at_once() -> Iterator[None]:
    """Fail where the block hangs."""

    def late(signum: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SOON_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def as_user(number: int = 65534) -> Iterator[None]:
    """Work as a user without rights, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(number)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
