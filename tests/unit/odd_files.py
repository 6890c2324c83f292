"""Odd files by kind: a function that makes one at a path, and the error that a reader raises."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from align.core.files import SIZE_LIMIT

SOON_S = 20
"""Seconds after which a reader counts as hanging."""


def make_socket(path: Path) -> None:
    previous_folder = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have about 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(previous_folder)


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
"""Kind → a function that makes it and a pattern of the error. No regular file is of these kinds."""


@contextmanager
def at_once() -> Iterator[None]:
    """Fail if the block hangs."""

    def raise_timeout(signum: int, frame: object) -> None:
        raise AssertionError("it hangs")

    previous_handler = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(SOON_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous_handler)


@contextmanager
def as_user(number: int = 65534) -> Iterator[None]:
    """Run the block as a user without rights if the tests run as root."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(number)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
