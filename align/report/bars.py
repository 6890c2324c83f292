"""Stacked bars as SVG text, for reports of data sets. matplotlib takes a second to import and to draw as many."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from jinja2 import Environment

from align.report.page import TEMPLATES, template_environment
from align.report.plots import COLOURS, FAINT, INK, MOST_LETTERS, ticks

WIDTH = 410
"""Pixels of a picture."""
LETTER = 6.2
"""Pixels of a letter, about."""
LINE = 18
"""Pixels of a line of text, and of a legend's entry."""
TOP = 30
"""Pixels above the bars."""
HEIGHT = 150
"""Pixels of upright bars."""
ROW = 24
"""Pixels of a lying bar, with the space around it."""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
STROKES = ("", "M0 6L6 0", "M3 2.9v.2", "M0 0L6 6", "M0 0L6 6M0 6L6 0", "M0 3H6")
"""The pattern over each part's colour, for eyes that do not tell colours apart."""

Parts = Mapping[str, Sequence[float]]
"""What the legend calls a part → its size in each bar."""


def lying_bars(names: Sequence[str], parts: Parts, xlabel: str, title: str) -> bytes:
    """Return a picture of horizontal bars, one a name from the top down, each of several parts."""
    shown = [*map(shorten, names)]
    margin = 12 + LETTER * max(map(len, shown))
    bottom = TOP + ROW * len(names)
    steps = axis_steps(parts)
    scale = (WIDTH - 24 - margin) / steps[-1]
    places = [margin + scale * value for value in steps]
    labels: list[tuple[Any, ...]] = [
        (x, bottom + 14, label, "middle") for x, label in zip(places, ticks(steps), strict=True)
    ]
    labels += [(margin - 6, TOP + ROW * (row + 0.5) + 4, name, "end") for row, name in enumerate(shown)]
    labels.append(((margin + WIDTH) / 2, bottom + 32, xlabel, "middle"))
    bars = [
        (margin + scale * start, TOP + ROW * (row + 0.15), scale * size, ROW * 0.7, part)
        for part, row, start, size in stacked(parts)
    ]
    return picture(parts, bottom + 44, title, grid=[(x, TOP, x, bottom) for x in places], bars=bars, labels=labels)


def upright_bars(
    names: Sequence[str], parts: Parts, xlabel: str, ylabel: str, title: str, cuts: Sequence[float] = ()
) -> bytes:
    """Return a picture of vertical bars that touch, each of several parts.

    Args:
        names: what is written below the left edge of each bar; one more stands at the end of the last bar.
        cuts: where dashed lines stand, in bars from the left.
    """
    bottom = TOP + HEIGHT
    steps = axis_steps(parts)
    marks = ticks(steps)
    margin = 30 + LETTER * max(map(len, marks))
    width = (WIDTH - 24 - margin) / len(next(iter(parts.values())))
    scale = HEIGHT / steps[-1]
    heights = [bottom - scale * value for value in steps]
    labels: list[tuple[Any, ...]] = [(margin - 6, y + 4, label, "end") for y, label in zip(heights, marks, strict=True)]
    every = math.ceil(LETTER * (max(map(len, names)) + 2) / width)
    labels += [(margin + width * bar, bottom + 14, names[bar], "middle") for bar in range(0, len(names), every)]
    labels.append(((margin + WIDTH) / 2, bottom + 32, xlabel, "middle"))
    middle = bottom - HEIGHT / 2
    labels.append((14, middle, ylabel, "middle", f'transform="rotate(-90 14 {middle:g})"'))
    bars = [
        (margin + width * bar, bottom - scale * (start + size), width, scale * size, part)
        for part, bar, start, size in stacked(parts)
    ]
    return picture(
        parts,
        bottom + 44,
        title,
        grid=[(margin, y, WIDTH - 24, y) for y in heights],
        bars=bars,
        labels=labels,
        cuts=[(margin + width * cut, TOP, margin + width * cut, bottom) for cut in cuts],
    )


def shorten(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def stacked(parts: Parts) -> list[tuple[int, int, float, float]]:
    """Return part, bar, start and size of each piece of each bar."""
    sizes = [*parts.values()]
    starts = [[*accumulate(bar, initial=0)] for bar in zip(*sizes, strict=True)]
    return [(part, bar, starts[bar][part], size) for part, row in enumerate(sizes) for bar, size in enumerate(row)]


def axis_steps(parts: Parts) -> list[float]:
    """Return at most six evenly spaced round numbers, from 0 up to the longest bar or above it."""
    largest = max(*map(sum, zip(*parts.values(), strict=True)), 1.0)
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(step for factor in (1, 2, 5, 10) if (step := max(factor * power, 1.0)) * 5 >= largest)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def picture(parts: Parts, bottom: float, title: str, **elements: Any) -> bytes:
    """Return the whole SVG, with the legend below if there is more than one part."""
    legend = [*map(shorten, parts)] if len(parts) > 1 else []
    picture = (
        svg_templates()
        .get_template("bars.svg")
        .render(
            {"cuts": (), **elements},
            width=WIDTH,
            height=bottom + LINE * math.ceil(len(legend) / 2),
            bottom=bottom,
            line_height=LINE,
            ink=INK,
            faint=FAINT,
            fills=[(COLOURS[part % len(COLOURS)], STROKES[part % len(STROKES)]) for part in range(len(parts))],
            legend=legend,
            title=title,
        )
    )
    return picture.encode()


@cache
def svg_templates() -> Environment:
    environment = template_environment(TEMPLATES)
    environment.filters["xml"] = lambda words: NOT_XML.sub("\ufffd", words)
    return environment
