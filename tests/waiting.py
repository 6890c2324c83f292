"""Wait for a condition that another thread or process meets, instead of sleeping for a fixed time."""

from __future__ import annotations

import time
from collections.abc import Callable

SOON_S = 600.0
"""A deadline that only a fault can exceed, even on a busy machine."""


def becomes_true(look: Callable[[], object], within_s: float = SOON_S) -> bool:
    """Wait until a condition is true. Returns False if it is not within `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
