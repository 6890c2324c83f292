"""How fast refusals leave. One takes a millisecond; whoever asks again at once, whatever they are told, would take
everybody's time with it."""

from __future__ import annotations

from collections.abc import Callable

PER_S, AT_ONCE, LONGEST_S = 10.0, 20, 2.5
"""A tenant's refusals a second, how many of them leave without a wait, and how long one is held at most: for less time
than the server takes to end, and so that a connection which is held cannot be taken for one that is lost."""


class Pace:
    """The generic cell rate algorithm (ITU-T I.371) for each tenant: refusals beyond the first ones leave evenly. Where
    many connections ask, so that the wait would be longer, each is answered after the longest one.

    Args:
        clock: seconds that run evenly.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._due: dict[str, float] = {}

    def wait(self, tenant: str) -> float:
        """Seconds until this refusal may leave. It counts."""
        now, slack = self.clock(), AT_ONCE / PER_S
        due = max(now, self._due.get(tenant, now)) + 1 / PER_S
        self._due[tenant] = due = min(due, now + slack + LONGEST_S)
        return max(0.0, due - now - slack)
