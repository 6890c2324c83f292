"""Who is served next where few can be at a time, and strangers crowd the door."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from align.core.errors import StorageError


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
    RFC 970, 1985). Where no room is left, the last in this order is sent away, be it the newcomer. Nobody waits longer
    than `patience_s`.

    Args:
        at_once: that are served.
        room: how many may wait.
        field: what of theirs is not looked at where they are sent away: a password, say.
    """

    def __init__(self, at_once: int, room: int, patience_s: float, field: str) -> None:
        self.free, self.room, self.patience_s, self.field = at_once, room, patience_s, field
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
