"""Stacked bars as SVG text, for reports of data sets. matplotlib takes a second to import and to draw as many."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any

from jinja2 import Environment

from align.report.page import TEMPLATES, template_environment
from align.report.plots import COLOURS, FAINT, INK, MOST_LETTERS, ticks

WIDTH = 410
"""Pixels of a picture."""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
STROKES = ("", "M0 6L6 0", "M3 2.9v.2", "M0 0L6 6", "M0 0L6 6M0 6L6 0", "M0 3H6")
"""The pattern over each part's colour, for eyes that do not tell colours apart."""

Parts = Mapping[str, Sequence[float]]
"""What the legend calls a part → its size in each bar."""


def lying_bars(names: Sequence[str], parts: Parts, xlabel: str, title: str) -> bytes:
    """Return a picture of horizontal bars, one a name from the top down, each of several parts."""
    return draw_bars(parts, upright=False, names=[*map(shorten, names)], xlabel=xlabel, title=title, cuts=())


def upright_bars(
    names: Sequence[str], parts: Parts, xlabel: str, ylabel: str, title: str, cuts: Sequence[float] = ()
) -> bytes:
    """Return a picture of vertical bars that touch, each of several parts.

    Args:
        names: what is written below the left edge of each bar; one more stands at the end of the last bar.
        cuts: where dashed lines stand, in bars from the left.
    """
    return draw_bars(parts, upright=True, names=names, xlabel=xlabel, ylabel=ylabel, title=title, cuts=cuts)


def shorten(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def axis_steps(parts: Parts) -> list[float]:
    """Return at most six evenly spaced round numbers, from 0 up to the longest bar or above it."""
    largest = max(*map(sum, zip(*parts.values(), strict=True)), 1.0)
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(step for factor in (1, 2, 5, 10) if (step := max(factor * power, 1.0)) * 5 >= largest)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def draw_bars(parts: Parts, **values: Any) -> bytes:
    """Return the whole SVG, with the legend below if there is more than one part."""
    steps = axis_steps(parts)
    fills = islice(zip(cycle(COLOURS), cycle(STROKES), strict=False), len(parts))
    legend = [*map(shorten, parts)] if len(parts) > 1 else []
    picture = svg_templates().get_template("bars.svg")
    values |= {"sizes": [*parts.values()], "steps": steps, "marks": ticks(steps), "fills": fills, "legend": legend}
    return picture.render(values, width=WIDTH, ink=INK, faint=FAINT).encode()


@cache
def svg_templates() -> Environment:
    environment = template_environment(TEMPLATES)
    environment.filters |= {"xml": lambda words: NOT_XML.sub("\ufffd", words), "zip": zip}
    return environment
