"""How often somebody may try: attempts that failed cost a wait, which doubles with each further one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Failures:
    number: int
    until: float
    """When the next attempt is looked at, by the throttle's clock."""


class Throttle:
    """Counts the failures of each name. Safe to share between threads.

    The first `free` failures cost nothing, the next one a second, then two, four, … up to `longest` seconds; what is
    tried during a wait is not looked at. A wait's length after its end a name starts afresh. At most `names` of them
    are kept, so that an attacker's inventions fill no memory: the oldest goes first.

    Args:
        clock: seconds that run evenly.
    """

    def __init__(self, clock: Callable[[], float], free: int = 5, longest: float = 300, names: int = 10_000) -> None:
        self.clock, self.free, self.longest, self.names = clock, free, longest, names
        self._failures: OrderedDict[str, Failures] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, name: str) -> float:
        """Seconds until the next attempt is looked at; 0: now."""
        with self._lock:
            known = self._failures.get(name)
            return 0.0 if known is None else max(0.0, known.until - self.clock())

    def failed(self, name: str) -> None:
        with self._lock:
            now, known = self.clock(), self._failures.pop(name, Failures(0, 0))
            if now > known.until + self.longest:
                known = Failures(0, 0)
            number = known.number + 1
            cost = 0.0 if number <= self.free else min(self.longest, 2.0 ** (number - self.free - 1))
            self._failures[name] = Failures(number, now + cost)
            while len(self._failures) > self.names:
                self._failures.popitem(last=False)

    def succeeded(self, name: str) -> None:
        with self._lock:
            self._failures.pop(name, None)
