"""What reading leaves out of a data set, counted where it is left out, for the metrics of the run that reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

COUNTS: ContextVar[Counter[str] | None] = ContextVar("COUNTS", default=None)


@contextmanager
def tallied() -> Iterator[Counter[str]]:
    """Key of a metric → what `tally` counts inside the block."""
    counts: Counter[str] = Counter()
    token = COUNTS.set(counts)
    try:
        yield counts
    finally:
        COUNTS.reset(token)


def tally(key: str, count: int) -> None:
    """Count for whoever keeps a tally. A count of 0 says that there was something to leave out by."""
    if (counts := COUNTS.get()) is not None:
        counts[key] += count
