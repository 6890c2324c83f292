"""Waiting for what happens in another thread or process: for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

SOON_S = 600.0
"""A deadline that only a fault reaches, however busy the machine."""


def settles(look: Callable[[], object], within_s: float = SOON_S) -> bool:
    """Return whether a condition becomes true before a deadline."""
    until = time.monotonic() + within_s
    while not look():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
