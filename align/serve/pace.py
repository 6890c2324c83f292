"""What keeps a tenant that floods from taking all time: how fast its refusals leave, and how many of its prompts
are read at once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PER_S, AT_ONCE, LONGEST_S = 10.0, 20, 30.0
"""A tenant's refusals a second, how many of them leave without a wait, and how long one is held at most: clients wait
for longer."""
HELD_OF_ONE, HELD = 256, 512
"""Refusals that wait at once, of one tenant and in all: each has a connection, and the server has 2,048."""
READ_AT_ONCE = 4


class Pace:
    """When a refusal may leave. It takes a millisecond, but a client that asks again at once, whatever it is told, asks
    as fast as it is refused.

    The generic cell rate algorithm (ITU-T I.371) for each tenant: refusals beyond the first ones leave evenly. If so
    many connections ask that the wait would be longer than the longest one, it is drawn from the upper half of that:
    refusals that left together would come back together.

    Args:
        clock: seconds that run evenly.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._due: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    @contextmanager
    def held(self, tenant: str) -> Iterator[float]:
        """Around the wait of a refusal: the seconds until it may leave, 0 where too many wait already. It counts."""
        full = self._held[tenant] >= HELD_OF_ONE or self._held.total() >= HELD
        self._held[tenant] += 1
        try:
            yield 0.0 if full else self.wait(tenant)
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]

    def wait(self, tenant: str) -> float:
        """See `held`."""
        now, slack = self.clock(), AT_ONCE / PER_S
        due = max(now, self._due.get(tenant, now)) + 1 / PER_S
        if due > now + slack + LONGEST_S:
            return random.uniform(LONGEST_S / 2, LONGEST_S)
        self._due[tenant] = due
        return max(0.0, due - now - slack)


class Readers:
    """Who may have a prompt read now: a tenant has so many at once, and no other's prompt waits for hundreds of its."""

    def __init__(self, at_once: int = READ_AT_ONCE) -> None:
        self._turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(at_once))

    def turn(self, tenant: str) -> asyncio.Semaphore:
        """To hold while a prompt is read."""
        return self._turns[tenant]
