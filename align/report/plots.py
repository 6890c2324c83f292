"""Plots in one style. matplotlib, which takes a second to import and is in the extra [plots], is imported by the
functions that draw; `Report.draw` calls them only if it is installed.

Figure objects only, since pyplot keeps global state, which threads and tests would share.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from align.ops.calibration import CalibrationBin
from align.report.figure_text import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

# Okabe and Ito's palette, distinguishable without red-green vision; line styles repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", "-.", ":")
INK, FAINT = "#333333", "#d9d9d9"
MOST_LETTERS = 28
"""Of a name beside a bar."""

SMOOTHED_FROM = 24
"""Points from which on a line is smoothed: over fewer the eye does it."""
MOST_POINTS = 600
"""Points of a line; of a longer run neighbours are drawn as one, their mean."""
MARKED_BELOW = 12
"""Points below which each of them has a mark."""


def render(figure: Figure, format: Literal["svg", "png"] = "svg", transparent: bool = False) -> bytes:
    """The figure's bytes, the same for the same figure: no date, and ids from a fixed salt."""
    import matplotlib

    buffer = io.BytesIO()
    about = {"Date": None} if format == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "align", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=format, dpi=160, metadata=about, transparent=transparent)
    return buffer.getvalue()


SMALL = (4.1, 2.7)
"""Inches: its text is legible on a telephone."""


def axes(xlabel: str, ylabel: str, title: str = "", size: tuple[float, float] = (4.8, 3.0)) -> tuple[Figure, Axes]:
    """An empty plot in the house style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, colors=INK, length=0)
    # A `$` in a label is a dollar: parsed as mathematics, an odd name would raise or come out in italics.
    ax.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    ax.set_xlabel(xlabel, fontsize=9, color=INK, parse_math=False)
    ax.set_ylabel(ylabel, fontsize=9, color=INK, parse_math=False)
    return figure, ax


def curves(
    rows: Sequence[Mapping[str, Any]],
    lines: Mapping[str, str],
    ylabel: str = "",
    title: str = "",
    xlabel: str = "step",
    span: float = 0.0,
    within: tuple[float, float] = (-math.inf, math.inf),
    marks: Sequence[tuple[float, float]] = (),
    marked: str = "",
    smooth: bool = True,
) -> Figure:
    """Lines over steps, from the objects of a `metrics.jsonl`. Long ones are drawn faint, with their running mean.

    Rows that lack a key (a figure not logged every step) are passed over; values that are not finite leave a gap.

    Args:
        lines: key of a row → what the legend calls it.
        span: the smallest range that the axis of the figure covers, so that noise looks like noise.
        within: what the figure can be, beyond which the axis need not go.
        marks: further points, (step, value), joined by a dashed line; `marked` is what the legend calls them.
        smooth: False for what was set, and is no measurement.
    """
    figure, ax = axes(xlabel, ylabel, title, SMALL)
    seen: list[tuple[float, float]] = list(marks)
    for i, (key, label) in enumerate(lines.items()):
        points = thinned(points_of(rows, key))
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        seen += [p for p in points if math.isfinite(p[1])]
        look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
        if smooth and len(points) >= SMOOTHED_FROM:
            ax.plot(xs, ys, color=look["color"], linewidth=0.8, alpha=0.3)
            ax.plot(xs, smoothed(ys), linewidth=1.8, label=label, **look)
        else:
            mark = "o" if len(points) < MARKED_BELOW else ""
            ax.plot(xs, ys, marker=mark, markersize=4, linewidth=1.5, label=label, **look)
    if marks:
        colour = COLOURS[len(lines) % len(COLOURS)]
        ax.plot(*zip(*marks, strict=True), "D--", color=colour, markersize=5, linewidth=1.2, label=marked)
    scale(ax, seen, span, within)
    if len(lines) > 1 or marks:
        _legend(figure)
    return figure


def points_of(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a figure; nan where it is not finite."""
    found = ((row["step"], row[key]) for row in rows if is_number(row.get("step")) and is_number(row.get(key)))
    return [(x, y if math.isfinite(y) else math.nan) for x, y in found]


def together(points: int) -> int:
    """How many neighbours a long line draws as one."""
    return math.ceil(points / MOST_POINTS)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: the means of so many neighbours, at the step of the last of them."""
    size = together(len(points)) or 1
    blocks = (points[i : i + size] for i in range(0, len(points), size))
    return [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]


def window(points: int) -> int:
    """How many neighbouring points a running mean is over; odd."""
    return 2 * (points // 24) + 1 if points >= SMOOTHED_FROM else 1


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, of fewer at the ends; nan where one of them is none."""
    reach = window(len(values)) // 2
    spans = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in spans]


def scale(ax: Axes, points: Sequence[tuple[float, float]], span: float, within: tuple[float, float]) -> None:
    """Whole steps below, a range of at least `span` beside, numbers written out."""
    from matplotlib.ticker import MaxNLocator

    numbered(ax)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    side = max(0.03 * (max(xs) - min(xs)), 0.5)  # half a step where there is one point alone
    ax.set_xlim(min(xs) - side, max(xs) + side)
    low, high = min(ys), max(ys)
    missing = max(0.0, span - (high - low)) / 2
    low, high = max(low - missing, min(low, within[0])), min(high + missing, max(high, within[1]))
    room = 0.06 * (high - low) or 0.5
    ax.set_ylim(low - room, high + room)


def numbered(ax: Axes) -> None:
    """Few numbers at the axes, each written out."""
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))
        axis.set_major_formatter(number_formatter()())


@cache
def number_formatter() -> type[Formatter]:
    """Return the class that writes the numbers of an axis, all in one notation."""
    from matplotlib.ticker import Formatter

    class NumberFormatter(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return ticks([x])[0]

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return ticks(values)

    return NumberFormatter


def ticks(values: Sequence[float]) -> list[str]:
    """Numbers at an axis: in powers of ten where all of them are tiny, as learning rates are, or one is huge."""
    largest = max(map(abs, values), default=0.0)
    if 0 < largest < 1e-3 or largest >= 1e7:
        return [in_powers(value) for value in values]
    return [(f"{v:,.0f}" if abs(v) >= 1e3 else f"{round(v, 9):.4g}").replace("-", "−") for v in values]


def in_powers(value: float) -> str:
    number, _, power = f"{value:.3e}".partition("e")
    return f"{float(number):g}e{int(power)}" if value else "0"


class Point(NamedTuple):
    """A point of a plane, each way with value, low and high of its interval.

    Attributes:
        label: written beside it.
        x, y: where it lies.
    """

    label: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def undominated(points: Sequence[Point], low: bool = False) -> list[Point]:
    """Return the points that no other point beats in both directions, from the lowest x up. One beats another if it is
    as good in both and its equal in one at most.

    Args:
        low: whether y is better low; x always is.
    """

    def place(point: Point) -> tuple[float, float]:
        return point.x[0], point.y[0] if low else -point.y[0]

    best: list[Point] = []
    for point in sorted(points, key=place):
        if not best or place(point)[1] < place(best[-1])[1] or place(point) == place(best[-1]):
            best.append(point)
    return best


def tradeoff(points: Sequence[Point], best: Sequence[Point], xlabel: str, ylabel: str) -> Figure:
    """Draw a figure against its cost.

    Args:
        best: the points that a line joins, see `undominated`.
    """
    figure, ax = axes(xlabel, ylabel, f"{ylabel} against {xlabel}", SMALL)
    ax.plot([p.x[0] for p in best], [p.y[0] for p in best], color=COLOURS[1], linewidth=1.2, linestyle="--")
    for p in points:
        spread = {"xerr": whiskers(p.x), "yerr": whiskers(p.y), "capsize": 2.5, "elinewidth": 0.8}
        ax.errorbar(p.x[0], p.y[0], fmt="o", markersize=5, color=COLOURS[1] if p in best else COLOURS[0], **spread)
        ax.annotate(
            p.label, (p.x[0], p.y[0]), fontsize=9, color=INK, xytext=(5, 4), textcoords="offset points",
            parse_math=False,
        )  # fmt: skip
    numbered(ax)
    return figure


def whiskers(figure: tuple[float, float, float]) -> list[list[float]]:
    """How far an interval reaches below and above its value; never the other way, whatever was rounded."""
    value, low, high = figure
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def reliability(bins: Sequence[CalibrationBin], title: str = "") -> Figure:
    """Predicted against observed share with 95 % intervals, the diagonal of perfect calibration, and counts."""
    figure, ax = axes("predicted chance that the first answer wins", "share that won", title, SMALL)
    ax.plot([0, 1], [0, 1], color="#8c8c8c", linestyle="--", linewidth=1.2, label="perfectly calibrated")
    shares = [b.observed for b in bins]
    spread = [[b.observed - b.low for b in bins], [b.high - b.observed for b in bins]]
    ax.errorbar([b.predicted for b in bins], shares, yerr=spread, fmt="o", color=COLOURS[0], markersize=4, capsize=2.5)
    for b in bins:
        place = {"xytext": (0, -9), "textcoords": "offset points", "ha": "center"}
        ax.annotate(str(b.count), (b.predicted, b.low), fontsize=7, color=INK, **place)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.12, 1.05)  # room for the counts under the lowest interval
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    _legend(figure)
    return figure


def histogram_pair(
    first: Sequence[float], second: Sequence[float], labels: tuple[str, str], xlabel: str, title: str = ""
) -> Figure:
    """Two samples over the same bins, as shares, so that samples of different size compare."""
    figure, ax = axes(xlabel, "share of the answers", title, SMALL)
    samples = [[float(v) for v in sample if math.isfinite(v)] for sample in (first, second)]
    pooled = samples[0] + samples[1]
    if pooled:
        low, width = min(pooled), (max(pooled) - min(pooled) or 1.0) / 24
        if width > 1 / 24 and all(v.is_integer() for v in pooled):  # unequal numbers of integers would show stripes
            low, width = low - 0.5, math.ceil((max(pooled) - low + 1) / 24)
        edges = [low + width * i for i in range(25)]
        for i, (sample, label) in enumerate(zip(samples, labels, strict=True)):
            weights = [1 / len(sample)] * len(sample) if sample else None
            ax.hist(sample, edges, weights=weights, color=COLOURS[i], alpha=0.55, label=label)
        numbered(ax)
        _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """Below the plot, where it covers no line."""
    legend = figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
