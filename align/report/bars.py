"""Stacked bars as SVG text, for reports of data sets. matplotlib takes a second to import and to draw as many."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from align.report.plots import COLOURS, FAINT, INK, MOST_LETTERS, ticks

WIDTH = 410
"""Pixels of a picture."""
LETTER = 6.2
"""Pixels of a letter, about."""
LINE = 18
"""Pixels of a line of text, and of a legend's entry."""
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
    labels = [*map(shorten, names)]
    margin = 12 + LETTER * max(map(len, labels))
    top = 30
    bottom = top + ROW * len(names)
    steps = axis_steps(bar_sizes(parts))
    scale = (WIDTH - 24 - margin) / steps[-1]
    elements = list[str]()
    for value, label in zip(steps, ticks(steps), strict=True):
        x = margin + scale * value
        elements += [line(x, top, x, bottom), text(x, bottom + 14, label, "middle")]
    for row, label in enumerate(labels):
        elements.append(text(margin - 6, top + ROW * (row + 0.5) + 4, label, "end"))
    for part, sizes in enumerate(parts.values()):
        for row, (start, size) in enumerate(zip(starts_of(parts, part), sizes, strict=True)):
            elements.append(rectangle(margin + scale * start, top + ROW * (row + 0.15), scale * size, ROW * 0.7, part))
    elements.append(text((margin + WIDTH) / 2, bottom + 32, xlabel, "middle"))
    return picture(elements, parts, bottom + 44, title)


def upright_bars(
    labels: Sequence[str], parts: Parts, xlabel: str, ylabel: str, title: str, cuts: Sequence[float] = ()
) -> bytes:
    """Return a picture of vertical bars that touch, each of several parts.

    Args:
        labels: what is written below the left edge of each bar; one more stands at the end of the last bar.
        cuts: where dashed lines stand, in bars from the left.
    """
    count = len(next(iter(parts.values())))
    top = 30
    bottom = top + HEIGHT
    steps = axis_steps(bar_sizes(parts))
    marks = ticks(steps)
    margin = 30 + LETTER * max(map(len, marks))
    width = (WIDTH - 24 - margin) / count
    scale = HEIGHT / steps[-1]
    elements = list[str]()
    for value, label in zip(steps, marks, strict=True):
        y = bottom - scale * value
        elements += [line(margin, y, WIDTH - 24, y), text(margin - 6, y + 4, label, "end")]
    for part, sizes in enumerate(parts.values()):
        for bar, (start, size) in enumerate(zip(starts_of(parts, part), sizes, strict=True)):
            elements.append(rectangle(margin + width * bar, bottom - scale * (start + size), width, scale * size, part))
    for cut in cuts:
        elements.append(
            line(margin + width * cut, top, margin + width * cut, bottom, f'stroke="{INK}" stroke-dasharray="5 3"')
        )
    every = math.ceil(LETTER * (max(map(len, labels)) + 2) / width)
    for bar in range(0, len(labels), every):
        elements.append(text(margin + width * bar, bottom + 14, labels[bar], "middle"))
    elements.append(text((margin + WIDTH) / 2, bottom + 32, xlabel, "middle"))
    turned = f'transform="rotate(-90 14 {bottom - HEIGHT / 2:g})"'
    elements.append(text(14, bottom - HEIGHT / 2, ylabel, "middle", turned))
    return picture(elements, parts, bottom + 44, title)


def shorten(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def bar_sizes(parts: Parts) -> list[float]:
    """Return the size of each whole bar."""
    return [sum(sizes) for sizes in zip(*parts.values(), strict=True)]


def starts_of(parts: Parts, part: int) -> list[float]:
    """Return where a part begins in each bar."""
    return [sum(sizes[:part]) for sizes in zip(*parts.values(), strict=True)]


def axis_steps(sizes: Sequence[float]) -> list[float]:
    """Return at most six evenly spaced round numbers, from 0 up to the largest size or above it."""
    largest = max(*sizes, 1.0)
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(step for factor in (1, 2, 5, 10) if (step := max(factor * power, 1.0)) * 5 >= largest)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def picture(elements: Sequence[str], parts: Parts, bottom: float, title: str) -> bytes:
    """Return the whole SVG, with the legend below if there is more than one part."""
    legend = [*legend_entries([*parts], bottom)] if len(parts) > 1 else []
    height = bottom + LINE * math.ceil(len(parts) / 2) if legend else bottom
    patterns = "".join(map(pattern, range(len(parts))))
    body = "".join([*elements, *legend, text(10, 18, title, "start", 'font-size="13"')])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-size="11" '
        f'font-family="sans-serif" fill="{INK}"><defs>{patterns}</defs>{body}</svg>'
    ).encode()


def legend_entries(names: Sequence[str], top: float) -> Iterator[str]:
    """Yield the entries of a legend of two columns."""
    for part, name in enumerate(names):
        x = 10 + WIDTH / 2 * (part % 2)
        y = top + LINE * (part // 2)
        yield rectangle(x, y, 20, 10, part)
        yield text(x + 26, y + 9, shorten(name), "start")


def pattern(part: int) -> str:
    """Return the definition of how a part is filled."""
    stroke = STROKES[part % len(STROKES)]
    return (
        f'<pattern id="part{part}" width="6" height="6" patternUnits="userSpaceOnUse">'
        f'<rect width="6" height="6" fill="{COLOURS[part % len(COLOURS)]}"/>'
        f'<path d="{stroke}" stroke="white" stroke-width="1.2" stroke-linecap="round"/></pattern>'
    )


def rectangle(x: float, y: float, width: float, height: float, part: int) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {box} fill="url(#part{part})" stroke="white" stroke-width=".6"/>' if width and height else ""


def line(x1: float, y1: float, x2: float, y2: float, look: str = f'stroke="{FAINT}"') -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" {look}/>'


def text(x: float, y: float, words: str, anchor: str, look: str = "") -> str:
    escaped = html.escape(NOT_XML.sub("�", words))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {look}>{escaped}</text>'
