"""Waits after failed logins, doubled with each further failure, and a fair queue for code that only a few threads may
run at the same time."""

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
    """The number of recent failed attempts under a name, and the end of the wait that they cost."""

    number: int
    until: float
    """Time by the throttle's clock from which the next attempt is allowed."""


class Throttle:
    """A counter of failed attempts under each name, which imposes a wait that doubles with each failure. Safe to share
    between threads.

    The first failures cost no wait, the next one a second, then two, four, … up to `longest` seconds. An attempt during
    a wait is refused. The count of a name is reset `longest` seconds after its last wait. Counts of at most `names`
    names are kept, so that invented names fill no memory; the oldest is dropped first.

    Args:
        clock: a monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float], longest: float = 300, names: int = 10_000) -> None:
        self.clock = clock
        self.longest = longest
        self.names = names
        self._failures: OrderedDict[str, Failures] = OrderedDict()
        self._lock = threading.Lock()

    def begin_attempt(self, name: str, free_attempts: int) -> float:
        """Return 0 if a login attempt under a name is allowed now, and count it as failed; else return the seconds to
        wait.

        An attempt counts as failed until `record_success` or `cancel_attempt` is called: parallel attempts are
        limited as consecutive ones are.

        Args:
            free_attempts: number of failures that cost no wait.
        """
        with self._lock:
            now = self.clock()
            failures = self._failures.get(name, Failures(0, 0))
            if now < failures.until:
                return failures.until - now
            number = 1 if now > failures.until + self.longest else failures.number + 1
            cost = 0.0 if number <= free_attempts else min(self.longest, 2.0 ** (number - free_attempts - 1))
            self._failures[name] = Failures(number, now + cost)
            self._failures.move_to_end(name)
            while len(self._failures) > self.names:
                self._failures.popitem(last=False)
            return 0.0

    def count_failures(self, name: str) -> int:
        """Return the number of recent failed attempts under a name, including attempts that have not ended yet."""
        with self._lock:
            failures = self._failures.get(name, Failures(0, 0))
            return 0 if self.clock() > failures.until + self.longest else failures.number

    def record_success(self, name: str) -> None:
        """Reset the failure count of a name after a successful attempt."""
        with self._lock:
            self._failures.pop(name, None)

    def cancel_attempt(self, name: str) -> None:
        """Subtract the last attempt under a name from its failure count and end the wait. Earlier failures still
        count."""
        with self._lock:
            failures = self._failures.get(name)
            if failures is not None:
                self._failures[name] = Failures(max(0, failures.number - 1), self.clock())


class ServerBusy(StorageError):
    """Error for a request that was refused because too many wait. Its content was not looked at."""

    def __init__(self, field: str) -> None:
        super().__init__(field, "(not shown)", "too many passwords are being checked at once", "Try again in a moment.")


@dataclass(eq=False, slots=True)
class Waiter:
    """A waiting thread in a `FairQueue` and its priority.

    Attributes:
        rank: recent failures, number of threads of the same queue key that wait already, number of arrival. The lowest
            rank is served next; the highest is refused if the queue is full.
        is_refused: True once it is out of the queue without its turn.
    """

    queue_key: str
    rank: tuple[int, int, int]
    is_refused: bool = False


class FairQueue:
    """A queue that limits how many threads run a block of code at the same time and how many wait for it. Safe to share
    between threads.

    The order is by recent failures, fewest first; then one thread of each queue key, then the second of each (fair
    queueing: Nagle, RFC 970, 1985). If the queue is full, the last thread in this order is refused, which may be the
    newest.

    Args:
        max_running: number of threads that may run the block at the same time.
        max_waiting: number of threads that may wait.
        max_wait_s: seconds after which a waiting thread is refused.
        field: field of the error of a refused thread, such as `password`.
    """

    def __init__(self, max_running: int, max_waiting: int, max_wait_s: float, field: str) -> None:
        self.free = max_running
        self.max_waiting = max_waiting
        self.max_wait_s = max_wait_s
        self.field = field
        self.waiting: list[Waiter] = []
        self._changed = threading.Condition()
        self._arrivals = 0

    @contextmanager
    def take_turn(self, queue_key: str, failures: int) -> Iterator[None]:
        """Wait until a slot is free and this thread is first in the queue, then run the `with` block.

        Args:
            queue_key: who takes turns with the others, such as an IP address.
            failures: recent failures of this queue key.

        Raises:
            ServerBusy: the thread was refused.
        """
        with self._changed:
            self._wait_for_turn(queue_key, failures)
            self.free -= 1
        try:
            yield
        finally:
            with self._changed:
                self.free += 1
                self._changed.notify_all()

    def _wait_for_turn(self, queue_key: str, failures: int) -> None:
        self._arrivals += 1
        share_count = sum(waiter.queue_key == queue_key for waiter in self.waiting)
        this = Waiter(queue_key, (failures, share_count, self._arrivals))
        self.waiting.append(this)
        if len(self.waiting) > self.max_waiting + self.free:
            last = max(self.waiting, key=lambda waiter: waiter.rank)
            last.is_refused = True
            self.waiting.remove(last)
            self._changed.notify_all()
        deadline = time.monotonic() + self.max_wait_s
        while not this.is_refused:
            if self.free > 0 and min(self.waiting, key=lambda waiter: waiter.rank) is this:
                self.waiting.remove(this)
                self._changed.notify_all()  # there may be room for another one
                return
            if not self._changed.wait(deadline - time.monotonic()) and not this.is_refused:
                self.waiting.remove(this)
                this.is_refused = True
        raise ServerBusy(self.field)
