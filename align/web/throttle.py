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

    The first ones cost nothing, the next one a second, then two, four, … up to `longest` seconds; what is tried during
    a wait is not looked at. `longest` seconds after its last wait a name starts afresh. At most `names` of them are
    kept, so that an attacker's inventions fill no memory: the oldest goes first.

    Args:
        clock: seconds that run evenly.
    """

    def __init__(self, clock: Callable[[], float], longest: float = 300, names: int = 10_000) -> None:
        self.clock, self.longest, self.names = clock, longest, names
        self._failures: OrderedDict[str, Failures] = OrderedDict()
        self._lock = threading.Lock()

    def attempt(self, name: str, free: int) -> float:
        """Begins an attempt, which counts as failed until it has succeeded: of many at once no more are looked at than
        of as many in a row. Returns 0, or the seconds until one is looked at.

        Args:
            free: failures that cost nothing.
        """
        with self._lock:
            now = self.clock()
            known = self._failures.get(name, Failures(0, 0))
            if now < known.until:
                return known.until - now
            number = 1 if now > known.until + self.longest else known.number + 1
            cost = 0.0 if number <= free else min(self.longest, 2.0 ** (number - free - 1))
            self._failures[name] = Failures(number, now + cost)
            self._failures.move_to_end(name)
            while len(self._failures) > self.names:
                self._failures.popitem(last=False)
            return 0.0

    def failures(self, name: str) -> int:
        """Attempts of a name that failed of late, or are under way."""
        with self._lock:
            known = self._failures.get(name, Failures(0, 0))
            return 0 if self.clock() > known.until + self.longest else known.number

    def succeeded(self, name: str) -> None:
        """All is forgotten that was counted of a name."""
        with self._lock:
            self._failures.pop(name, None)

    def forgive(self, name: str) -> None:
        """The attempt that was begun last did not fail, which says nothing of those before it."""
        with self._lock:
            known = self._failures.get(name)
            if known is not None:
                self._failures[name] = Failures(max(0, known.number - 1), self.clock())
