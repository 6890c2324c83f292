"""What `stage=data` prints while it works, for whoever waits: how far it is, and what takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from align.report.figure_text import duration, percent

OFTEN_S = 10.0
"""Seconds between two lines on one thing."""
MANY = 200_000
"""Rows from which on a step behind the reading says that it begins."""


def seldom(said: Callable[[int, int, float], str]) -> Callable[[int, int], None]:
    """Prints what is said of two counts and the seconds since they began, once in a while."""
    began = last = time.perf_counter()

    def tell(one: int, other: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > OFTEN_S:
            print(said(one, other, now - began), flush=True)
            last = now

    return tell


def reading(name: str, share_read: Callable[[], float | None]) -> Callable[[int, int], None]:
    """Prints how far a source is: how many rows are read and kept, and which share of its bytes where that is known."""
    began, first = time.perf_counter(), list[tuple[float, float]]()

    def said(read: int, kept: int, seconds: float) -> str:
        rate = f"{read / max(seconds, 1e-9):,.0f} rows a second{how_far(seconds, share_read(), first)}"
        return f"{name}: {read:,} rows read, {kept:,} kept, {rate}"

    line = seldom(said)

    def tell(read: int, kept: int) -> None:
        share = None if first else share_read()
        if share is not None:  # what was read before a kill was not read at this pace
            first.append((time.perf_counter() - began, share))
        line(read, kept)

    return tell


def begins(what: str, count: int) -> None:
    """Prints that a step begins which takes long where there are many rows."""
    if count >= MANY:
        print(f"{what} {count:,} rows", flush=True)


def how_far(now: float, share: float | None, first: Sequence[tuple[float, float]]) -> str:
    """Which share of a source's bytes is read, and how long the rest takes at the pace since then; nothing where nobody
    knows.

    Args:
        now: seconds, as of `first`.
        first: when that was looked at first, and the share then; empty where it was not.
    """
    if share is None:
        return ""
    left = ""
    for then, before in first:
        if share > before:
            left = f", about {duration((now - then) * (1 - share) / (share - before))} left"
    return f", {percent(share)} of its bytes{left}"
