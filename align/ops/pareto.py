"""Which of several points no other one is better than: pure, without NumPy."""

from __future__ import annotations

from collections.abc import Sequence


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """The points that no other one dominates, from the lowest cost up. One dominates another where it costs no more,
    gains no less, and is not its equal in both.

    Args:
        costs: what is better low, shape [n]; finite.
        gains: what is better high, shape [n]; finite.
    """
    found: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -gains[i])):
        best = found[-1] if found else None
        equal = best is not None and (costs[i], gains[i]) == (costs[best], gains[best])
        if best is None or gains[i] > gains[best] or equal:
            found.append(i)
    return found
