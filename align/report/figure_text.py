"""Figures in words: numbers as a person reads them, and what is to be said of few observations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

FEW = 20
"""Number of observations below which an interval says little."""


def format_figure(value: Any) -> str:
    """A figure as a person reads it: four significant digits, thousands parted, an interval as `0.62 [0.55, 0.69]`."""
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
        count = f" (n={value['n']:,}{few(value['n'])})" if "n" in value else ""
        large = 1e3 <= abs(value["value"]) < 1e9
        return f"{in_words(value, ',.0f' if large else '.4g')}{count}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_figure, value)) or "none"
    return str(value)


def in_words(figure: Mapping[str, Any], digits: str = ".3f") -> str:
    """`0.812 [0.760, 0.856]` of `{value, low, high}`; an interval may be missing. What these digits would show as 0 is
    written with two that count."""
    value, low, high = figure["value"], figure["low"], figure["high"]
    numbers = [number for number in (value, low, high) if number is not None]
    if any(number != 0 and float(f"{number:{digits}}".replace(",", "")) == 0 for number in numbers):
        digits = ".2g"
    if low is None or high is None:
        return f"{value:{digits}} (no interval)"
    return f"{value:{digits}} [{low:{digits}}, {high:{digits}}]"


def from_to(before: float, after: float) -> str:
    """`rose from 0.10 to 0.25`, in as many decimals as tell them apart, two to five; or `stayed at 0.10`."""
    verb = "fell" if after < before else "rose"
    for digits in range(2, 6):
        texts = f"{before:.{digits}f}", f"{after:.{digits}f}"
        if texts[0] != texts[1]:
            return f"{verb} from {texts[0]} to {texts[1]}"
    return f"stayed at {before:.2f}"


NO_BREAK = "\u00a0"
"""A blank at which no line breaks."""


def percent(value: Any) -> str:
    """A share in percent, `82 % [77, 87]` where it has an interval; with a decimal where the interval is narrow."""
    if not is_interval(value):
        return f"{100 * value:.3g}{NO_BREAK}%"
    narrow = value["low"] is not None and value["high"] - value["low"] < 0.02
    number = ".1f" if narrow else ".0f"
    shown = f"{100 * value['value']:{number}}{NO_BREAK}%"
    return f"{shown} [{100 * value['low']:{number}}, {100 * value['high']:{number}}]" if is_bounded(value) else shown


def signed(value: float) -> str:
    """Two decimals, with the minus of print."""
    return f"{value:.2f}".replace("-", "−")


def few(n: int) -> str:
    """What stands behind a number of observations that is too small for its interval to say much."""
    return f", fewer than {FEW}" if n < FEW else ""


def duration(seconds: float) -> str:
    """`42 seconds`, `12 minutes`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds" if round(seconds) != 1 else "1 second"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def moment(iso: str, clock: str = "%H:%M") -> str:
    """A time of a manifest, `27 November 2026, 14:03 UTC`."""
    at = datetime.fromisoformat(iso)
    return f"{at.day} {at:%B %Y}, {at.strftime(clock)} UTC"


def one_line(text: str) -> str:
    """Somebody's text on one line: what would move a terminal's cursor is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def align_columns(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows of equally many cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def counted(n: int, what: str) -> str:
    """`1 prompt`, `2,000 prompts`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_interval(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys()


def is_bounded(interval: Mapping[str, Any]) -> bool:
    return interval["low"] is not None and interval["high"] is not None


def flattened(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key → figure, of nested mappings; an interval is one figure."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and not is_interval(value):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
