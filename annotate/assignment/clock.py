"""What time it is, for leases."""

from __future__ import annotations

import time


class Clock:
    """Seconds since 1970 that run evenly: the wall clock when it was made, and the monotonic clock since. A wall clock
    that jumps ends nobody's lease. Of two processes each has its own: serve a project from one."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()
