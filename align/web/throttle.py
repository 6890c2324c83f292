"""Turns to try: attempts that failed cost a wait, which doubles with each further one; and a fair queue if only few can
be served at a time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from align.core.errors import StorageError


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
        self.clock = clock
        self.longest = longest
        self.names = names
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


class Busy(StorageError):
    """Too many are waiting; nothing was looked at."""

    def __init__(self, field: str) -> None:
        super().__init__(field, "(not shown)", "many people are at the door", "Try again in a moment.")


@dataclass(eq=False, slots=True)
class Waiter:
    """Attributes:
    rank: the lowest is served next, the highest makes room: failures of late, how many of the same share wait before,
        and when it came.
    sent_away: it made room for somebody.
    """

    share: str
    rank: tuple[int, int, int]
    sent_away: bool = False


class FairQueue:
    """Serves some at once and lets some wait, in threads of their own. Safe to share between threads.

    Those who have failed least go first, and of these one of each share, then the next of each (fair queueing: Nagle,
    RFC 970, 1985). Where no room is left, the last in this order is sent away, be it the newcomer. No one waits longer
    than `patience_s`.

    Args:
        at_once: that are served.
        room: how many may wait.
        field: what of theirs is not looked at where they are sent away: a password, say.
    """

    def __init__(self, at_once: int, room: int, patience_s: float, field: str) -> None:
        self.free = at_once
        self.room = room
        self.patience_s = patience_s
        self.field = field
        self.waiting: list[Waiter] = []
        self._changed = threading.Condition()
        self._came = 0

    @contextmanager
    def turn(self, share: str, failures: int) -> Iterator[None]:
        """A block that begins when it is one's turn.

        Args:
            share: who shares a turn: an address, say.
            failures: of this share, of late.

        Raises:
            Busy: others go first.
        """
        with self._changed:
            self._wait(share, failures)
            self.free -= 1
        try:
            yield
        finally:
            with self._changed:
                self.free += 1
                self._changed.notify_all()

    def _wait(self, share: str, failures: int) -> None:
        self._came += 1
        alike = sum(other.share == share for other in self.waiting)
        mine = Waiter(share, (failures, alike, self._came))
        self.waiting.append(mine)
        if len(self.waiting) > self.room + self.free:
            last = max(self.waiting, key=lambda waiting: waiting.rank)
            last.sent_away = True
            self.waiting.remove(last)
            self._changed.notify_all()
        until = time.monotonic() + self.patience_s
        while not mine.sent_away:
            if self.free > 0 and min(self.waiting, key=lambda waiting: waiting.rank) is mine:
                self.waiting.remove(mine)
                self._changed.notify_all()  # there may be a second place
                return
            if not self._changed.wait(until - time.monotonic()) and not mine.sent_away:
                self.waiting.remove(mine)
                mine.sent_away = True
        raise Busy(self.field)
