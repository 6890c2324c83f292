"""Progress lines that `stage=data` prints while it reads and processes rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from align.report.figure_text import format_duration, format_percent

OFTEN_S = 10.0
"""Minimum number of seconds between two printed progress lines of one source or step."""
MANY = 200_000
"""Minimum number of rows for which the start of a processing step is printed."""


def create_progress_printer(format_line: Callable[[int, int, float], str]) -> Callable[[int, int], None]:
    """Return a function that takes two counts and prints a progress line with them, at most every OFTEN_S seconds.

    Args:
        format_line: returns the line from both counts and the seconds since this call.
    """
    start = last = time.perf_counter()

    def print_line(first_count: int, second_count: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > OFTEN_S:
            print(format_line(first_count, second_count, now - start), flush=True)
            last = now

    return print_line


def create_reading_progress(name: str, get_share_read: Callable[[], float | None]) -> Callable[[int, int], None]:
    """Return a function that takes the numbers of rows read and kept, and prints the progress of reading a source.

    A line is printed at most every OFTEN_S seconds.

    Args:
        get_share_read: returns the share of the source's bytes that is read, or None if that is unknown.
    """
    start = time.perf_counter()
    first_reading: list[tuple[float, float]] = []

    def format_line(rows_read: int, rows_kept: int, seconds: float) -> str:
        rate = f"{rows_read / max(seconds, 1e-9):,.0f} rows a second"
        progress = describe_share_read(seconds, get_share_read(), first_reading)
        return f"{name}: {rows_read:,} rows read, {rows_kept:,} kept, {rate}{progress}"

    print_line = create_progress_printer(format_line)

    def update(rows_read: int, rows_kept: int) -> None:
        share = None if first_reading else get_share_read()
        if share is not None:  # rows restored after a crash were not read at this pace
            first_reading.append((time.perf_counter() - start, share))
        print_line(rows_read, rows_kept)

    return update


def print_start(step: str, count: int) -> None:
    """Print a line that a processing step begins, if it has MANY rows or more; otherwise print nothing."""
    if count >= MANY:
        print(f"{step} {count:,} rows", flush=True)


def describe_share_read(seconds: float, share: float | None, first_reading: Sequence[tuple[float, float]]) -> str:
    """Return a phrase on the share of a source's bytes that is read, and the time left; empty for an unknown share.

    Args:
        seconds: time since the start.
        share: share of the source's bytes that is read.
        first_reading: at most one (seconds, share) of the first look at the share. The pace since then gives the time
            left.
    """
    if share is None:
        return ""
    time_left = ""
    for first_seconds, first_share in first_reading:
        if share > first_share:
            seconds_left = (seconds - first_seconds) * (1 - share) / (share - first_share)
            time_left = f", about {format_duration(seconds_left)} left"
    return f", {format_percent(share)} of its bytes{time_left}"
