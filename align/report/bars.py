"""Stacked bar charts written as SVG without matplotlib, which would take seconds to import and draw them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any

from jinja2 import Environment

from align.report.page import TEMPLATES, create_template_environment
from align.report.plots import COLOURS, FAINT, INK, MAX_NAME_LENGTH, format_tick_labels

WIDTH = 410
"""Width of a bar chart in pixels."""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
STROKES = ("", "M0 6L6 0", "M3 2.9v.2", "M0 0L6 6", "M0 0L6 6M0 6L6 0", "M0 3H6")
"""SVG paths drawn over the colour of each part, so that parts differ without colour vision."""

Parts = Mapping[str, Sequence[float]]
"""Label of a part in the legend → its size in each bar."""


def draw_horizontal_bars(names: Sequence[str], parts: Parts, xlabel: str, title: str) -> bytes:
    """Draw a chart of horizontal stacked bars, one per name from top to bottom, and return it as SVG."""
    return render_bars(parts, upright=False, names=[*map(shorten_name, names)], xlabel=xlabel, title=title, cuts=())


def draw_vertical_bars(
    names: Sequence[str], parts: Parts, xlabel: str, ylabel: str, title: str, cuts: Sequence[float] = ()
) -> bytes:
    """Draw vertical stacked bars without gaps between them, such as a histogram, and return them as SVG.

    Args:
        names: labels at the edges of the bars, one more than there are bars.
        cuts: positions of dashed vertical lines, in bars from the left.
    """
    return render_bars(parts, upright=True, names=names, xlabel=xlabel, ylabel=ylabel, title=title, cuts=cuts)


def shorten_name(name: str) -> str:
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def compute_axis_ticks(parts: Parts) -> list[float]:
    """Return at most six round, evenly spaced ticks for a bar chart's axis, from 0 to at least the longest bar."""
    largest = max(*map(sum, zip(*parts.values(), strict=True)), 1.0)
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(step for factor in (1, 2, 5, 10) if (step := max(factor * power, 1.0)) * 5 >= largest)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def render_bars(parts: Parts, **values: Any) -> bytes:
    """Render a stacked bar chart as SVG from a template, with a legend if there is more than one part.

    Longer names in the legend are shortened.

    Args:
        values: further variables of `templates/bars.svg`.
    """
    steps = compute_axis_ticks(parts)
    fills = islice(zip(cycle(COLOURS), cycle(STROKES), strict=False), len(parts))
    legend = [*map(shorten_name, parts)] if len(parts) > 1 else []
    template = load_svg_templates().get_template("bars.svg")
    values |= {
        "sizes": [*parts.values()],
        "steps": steps,
        "marks": format_tick_labels(steps),
        "fills": fills,
        "legend": legend,
    }
    return template.render(values, width=WIDTH, ink=INK, faint=FAINT).encode()


@cache
def load_svg_templates() -> Environment:
    environment = create_template_environment(TEMPLATES)
    environment.filters |= {"xml": lambda text: NOT_XML.sub("\ufffd", text), "zip": zip}
    return environment
