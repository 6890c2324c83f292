"""Find a free TCP port for a server of a test."""

from __future__ import annotations

import socket


def pick_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
