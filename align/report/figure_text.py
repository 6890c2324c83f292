"""Formatting of metrics as text: numbers, intervals, percentages, durations and notes on small samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

FEW = 20
"""Number of observations below which a metric is noted as measured on a small sample."""


def format_figure(value: Any) -> str:
    """Format a metric as text: numbers with four significant digits and thousands commas, intervals as `0.62 [0.55,
    0.69]`.

    None becomes `none`, and True and False become `yes` and `no`.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"
    if is_interval(value):
        count = f" (n={value['n']:,}{note_small_sample(value['n'])})" if "n" in value else ""
        large = 1e3 <= abs(value["value"]) < 1e9
        return f"{format_interval(value, ',.0f' if large else '.4g')}{count}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_figure, value)) or "none"
    return str(value)


def format_interval(figure: Mapping[str, Any], digits: str = ".3f") -> str:
    """Format an interval `{value, low, high}` as text: `0.812 [0.760, 0.856]`, or `0.812 (no interval)` without bounds.

    Args:
        digits: format specification. If it would round a number to 0, two significant digits are used instead.
    """
    value = figure["value"]
    low = figure["low"]
    high = figure["high"]
    numbers = [number for number in (value, low, high) if number is not None]
    if any(number != 0 and float(f"{number:{digits}}".replace(",", "")) == 0 for number in numbers):
        digits = ".2g"
    if low is None or high is None:
        return f"{value:{digits}} (no interval)"
    return f"{value:{digits}} [{low:{digits}}, {high:{digits}}]"


def describe_change(before: float, after: float) -> str:
    """Return a phrase on the change of a number: `rose from 0.10 to 0.25`, `fell from …` or `stayed at 0.10`.

    The numbers have as many decimals as it takes to tell them apart, from two to five.
    """
    verb = "fell" if after < before else "rose"
    for digits in range(2, 6):
        before_text = f"{before:.{digits}f}"
        after_text = f"{after:.{digits}f}"
        if before_text != after_text:
            return f"{verb} from {before_text} to {after_text}"
    return f"stayed at {before:.2f}"


NO_BREAK = "\u00a0"
"""The no-break space, which stands before a percent sign."""


def format_percent(value: Any) -> str:
    """Format a fraction as a percentage, such as `82 %`, or `82 % [77, 87]` if it has an interval.

    The numbers have a decimal if the interval is narrower than two percentage points.
    """
    if not is_interval(value):
        return f"{100 * value:.3g}{NO_BREAK}%"
    is_narrow = value["low"] is not None and value["high"] - value["low"] < 0.02
    digits = ".1f" if is_narrow else ".0f"
    share = f"{100 * value['value']:{digits}}{NO_BREAK}%"
    return f"{share} [{100 * value['low']:{digits}}, {100 * value['high']:{digits}}]" if is_bounded(value) else share


def format_signed(value: float) -> str:
    """Format a number with two decimals and a typographic minus sign; a positive number has no sign."""
    return f"{value:.2f}".replace("-", "−")


def note_small_sample(n: int) -> str:
    """Return `, fewer than 20` for a number of observations below FEW, and an empty string for larger numbers."""
    return f", fewer than {FEW}" if n < FEW else ""


def format_duration(seconds: float) -> str:
    """Format a duration in seconds as text, such as `42 seconds`, `12 minutes` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds" if round(seconds) != 1 else "1 second"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def format_timestamp(iso: str, clock: str = "%H:%M") -> str:
    """Format an ISO 8601 time in UTC as `27 November 2026, 14:03 UTC`.

    Args:
        clock: format of the time of day.
    """
    time = datetime.fromisoformat(iso)
    return f"{time.day} {time:%B %Y}, {time.strftime(clock)} UTC"


def escape_unprintable(text: str) -> str:
    """Replace every unprintable character, such as a line break or a control character, by its Python escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def align_columns(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a text table, with each column padded to its widest cell.

    Args:
        lines: rows of equally many cells.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def pluralize(n: int, noun: str) -> str:
    """Format a count with its noun in the singular or plural, such as `1 prompt` or `2,000 prompts`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys()


def is_bounded(interval: Mapping[str, Any]) -> bool:
    return interval["low"] is not None and interval["high"] is not None


def flatten_metrics(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every metric in nested mappings; an interval, itself a mapping, is one value."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and not is_interval(value):
            yield from flatten_metrics(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
