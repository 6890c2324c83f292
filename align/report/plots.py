"""matplotlib plots for reports: training curves, trade-offs with a Pareto front, reliability diagrams, histograms.

matplotlib takes a second to import and is in the extra [plots]: it is imported inside the functions that draw, and
`Report.draw` calls them only if it is installed. pyplot is not used, because threads and tests would share its global
state.
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
INK = "#333333"
FAINT = "#d9d9d9"
MAX_NAME_LENGTH = 28
"""Maximum number of characters of a name beside a bar."""

SMOOTHED_FROM = 24
"""Minimum number of points of a line that is drawn with a running mean."""
MAX_POINTS = 600
"""Maximum number of points of a line. Neighbouring points of a longer series are averaged."""
MARKED_BELOW = 12
"""Number of points of a line below which each point is drawn with a marker."""


def render_figure(figure: Figure, format: Literal["svg", "png"] = "svg", transparent: bool = False) -> bytes:
    """Render a matplotlib figure as SVG or PNG and return the image, with equal bytes for equal figures.

    To that end it has no date, and SVG ids from a fixed salt.
    """
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "align", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=format, dpi=160, metadata=metadata, transparent=transparent)
    return buffer.getvalue()


SMALL = (4.1, 2.7)
"""Width and height of a plot in inches, at which its text is legible on a phone."""


def create_axes(
    xlabel: str, ylabel: str, title: str = "", size: tuple[float, float] = (4.8, 3.0)
) -> tuple[Figure, Axes]:
    """Create a matplotlib figure with one empty plot in the style of the reports. Returns the figure and its axes.

    Args:
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=9, colors=INK, length=0)
    # A `$` in a label is a dollar sign. Parsed as mathematics, an odd name would raise or be set in italics.
    ax.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    ax.set_xlabel(xlabel, fontsize=9, color=INK, parse_math=False)
    ax.set_ylabel(ylabel, fontsize=9, color=INK, parse_math=False)
    return figure, ax


def draw_curves(
    rows: Sequence[Mapping[str, Any]],
    lines: Mapping[str, str],
    ylabel: str = "",
    title: str = "",
    xlabel: str = "step",
    span: float = 0.0,
    within: tuple[float, float] = (-math.inf, math.inf),
    marks: Sequence[tuple[float, float]] = (),
    marks_label: str = "",
    smooth: bool = True,
) -> Figure:
    """Draw a line plot of metrics over training steps, with a running mean on top of lines with many points.

    Rows that lack a key are skipped, since a metric may not be logged at every step. Values that are not finite leave a
    gap.

    Args:
        rows: rows of a `metrics.jsonl`.
        lines: key of a row → label in the legend.
        span: the smallest range of the y axis, so that noise in a constant metric does not look like a trend.
        within: range of values that the metric can have. The y axis is not widened beyond it.
        marks: additional (step, value) points, joined by a dashed line.
        marks_label: label of `marks` in the legend.
        smooth: False for a value that is set and not measured, such as the learning rate.
    """
    figure, ax = create_axes(xlabel, ylabel, title, SMALL)
    finite_points: list[tuple[float, float]] = list(marks)
    for i, (key, label) in enumerate(lines.items()):
        points = average_blocks(collect_points(rows, key))
        xs = [x for x, _ in points]
        ys = [y for _, y in points]
        finite_points += [point for point in points if math.isfinite(point[1])]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}
        if smooth and len(points) >= SMOOTHED_FROM:
            ax.plot(xs, ys, color=style["color"], linewidth=0.8, alpha=0.3)
            ax.plot(xs, smooth_values(ys), linewidth=1.8, label=label, **style)
        else:
            marker = "o" if len(points) < MARKED_BELOW else ""
            ax.plot(xs, ys, marker=marker, markersize=4, linewidth=1.5, label=label, **style)
    if marks:
        colour = COLOURS[len(lines) % len(COLOURS)]
        ax.plot(*zip(*marks, strict=True), "D--", color=colour, markersize=5, linewidth=1.2, label=marks_label)
    set_axis_limits(ax, finite_points, span, within)
    if len(lines) > 1 or marks:
        add_legend(figure)
    return figure


def collect_points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the (step, value) points of a metric from the rows that have it. Infinite values become NaN."""
    points = ((row["step"], row[key]) for row in rows if is_number(row.get("step")) and is_number(row.get(key)))
    return [(x, y if math.isfinite(y) else math.nan) for x, y in points]


def get_block_size(n_points: int) -> int:
    """Return the number of neighbouring points to average into one, so that at most MAX_POINTS remain."""
    return math.ceil(n_points / MAX_POINTS)


def average_blocks(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduce a series to at most MAX_POINTS points by averaging neighbours.

    Each mean is at the last step of its block.
    """
    size = get_block_size(len(points)) or 1
    blocks = (points[i : i + size] for i in range(0, len(points), size))
    return [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]


def get_smoothing_window(n_points: int) -> int:
    """Return the number of neighbouring points in a running mean of a series: odd, and 1 if the series is short."""
    return 2 * (n_points // 24) + 1 if n_points >= SMOOTHED_FROM else 1


def smooth_values(values: Sequence[float]) -> list[float]:
    """Return the centred running mean of a series, of equal length, over fewer values at the ends.

    A mean is NaN if a value in its window is NaN.
    """
    reach = get_smoothing_window(len(values)) // 2
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def set_axis_limits(ax: Axes, points: Sequence[tuple[float, float]], span: float, within: tuple[float, float]) -> None:
    """Set the ranges of the axes to fit the points, with a y range of at least `span` and x ticks at whole steps.

    Args:
        within: range of values beyond which the y axis is not widened.
    """
    from matplotlib.ticker import MaxNLocator

    format_axes(ax)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if not points:
        return
    xs, ys = zip(*points, strict=True)
    x_padding = max(0.03 * (max(xs) - min(xs)), 0.5)  # half a step if there is only one point
    ax.set_xlim(min(xs) - x_padding, max(xs) + x_padding)
    lowest = min(ys)
    highest = max(ys)
    widening = max(0.0, span - (highest - lowest)) / 2
    low = max(lowest - widening, min(lowest, within[0]))
    high = min(highest + widening, max(highest, within[1]))
    y_padding = 0.06 * (high - low) or 0.5
    ax.set_ylim(low - y_padding, high + y_padding)


def format_axes(ax: Axes) -> None:
    """Limit each axis to about five ticks, and format their labels in one notation without an offset."""
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=5))
        axis.set_major_formatter(load_tick_formatter()())


@cache
def load_tick_formatter() -> type[Formatter]:
    """Return a matplotlib Formatter class that formats all ticks of an axis in one notation.

    It is defined here to import matplotlib late.
    """
    from matplotlib.ticker import Formatter

    class TickFormatter(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return format_tick_labels([x])[0]

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return format_tick_labels(values)

    return TickFormatter


def format_tick_labels(values: Sequence[float]) -> list[str]:
    """Format the tick values of an axis as labels, all in scientific notation if they are tiny or one is huge.

    Tiny is below 1e-3, huge is 1e7 or more.
    """
    largest = max(map(abs, values), default=0.0)
    if 0 < largest < 1e-3 or largest >= 1e7:
        return [format_scientific(value) for value in values]
    return [(f"{v:,.0f}" if abs(v) >= 1e3 else f"{round(v, 9):.4g}").replace("-", "−") for v in values]


def format_scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


class Point(NamedTuple):
    """A labelled point of a plot, with an interval for both x and y.

    Attributes:
        label: text beside the point.
        x, y: (value, low, high).
    """

    label: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def find_pareto_front(points: Sequence[Point], lower_y_is_better: bool = False) -> list[Point]:
    """Return the Pareto front of points, sorted by x: the points that no other point dominates. Smaller x is better.

    A point dominates another if it is at least as good in both directions and better in one.

    Args:
        lower_y_is_better: True if a low y is better. A low x always is.
    """

    def get_costs(point: Point) -> tuple[float, float]:
        return point.x[0], point.y[0] if lower_y_is_better else -point.y[0]

    front: list[Point] = []
    for point in sorted(points, key=get_costs):
        if not front or get_costs(point)[1] < get_costs(front[-1])[1] or get_costs(point) == get_costs(front[-1]):
            front.append(point)
    return front


def draw_tradeoff(points: Sequence[Point], best: Sequence[Point], xlabel: str, ylabel: str) -> Figure:
    """Draw a scatter plot of a metric against its cost, with error bars and the Pareto front as a dashed line.

    Args:
        best: the Pareto front, see `find_pareto_front`.
    """
    figure, ax = create_axes(xlabel, ylabel, f"{ylabel} against {xlabel}", SMALL)
    ax.plot([p.x[0] for p in best], [p.y[0] for p in best], color=COLOURS[1], linewidth=1.2, linestyle="--")
    for p in points:
        ax.errorbar(
            p.x[0],
            p.y[0],
            xerr=get_error_bar(p.x),
            yerr=get_error_bar(p.y),
            fmt="o",
            markersize=5,
            color=COLOURS[1] if p in best else COLOURS[0],
            capsize=2.5,
            elinewidth=0.8,
        )
        ax.annotate(
            p.label,
            (p.x[0], p.y[0]),
            fontsize=9,
            color=INK,
            xytext=(5, 4),
            textcoords="offset points",
            parse_math=False,
        )
    format_axes(ax)
    return figure


def get_error_bar(interval: tuple[float, float, float]) -> list[list[float]]:
    """Return the error bar of (value, low, high) for matplotlib: [[length below], [length above]], not negative."""
    value, low, high = interval
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def draw_reliability(bins: Sequence[CalibrationBin], title: str = "") -> Figure:
    """Draw a reliability diagram: observed against predicted win shares, with 95 % intervals and counts."""
    figure, ax = create_axes("predicted chance that the first answer wins", "share that won", title, SMALL)
    ax.plot([0, 1], [0, 1], color="#8c8c8c", linestyle="--", linewidth=1.2, label="perfectly calibrated")
    predicted = [b.predicted for b in bins]
    observed = [b.observed for b in bins]
    errors = [[b.observed - b.low for b in bins], [b.high - b.observed for b in bins]]
    ax.errorbar(predicted, observed, yerr=errors, fmt="o", color=COLOURS[0], markersize=4, capsize=2.5)
    for b in bins:
        ax.annotate(
            str(b.count),
            (b.predicted, b.low),
            fontsize=7,
            color=INK,
            xytext=(0, -9),
            textcoords="offset points",
            ha="center",
        )
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.12, 1.05)  # room for the counts under the lowest interval
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    add_legend(figure)
    return figure


def draw_histogram_pair(
    first: Sequence[float], second: Sequence[float], labels: tuple[str, str], xlabel: str, title: str = ""
) -> Figure:
    """Draw two samples as overlaid histograms of shares with the same bins, so that different sizes can be compared."""
    figure, ax = create_axes(xlabel, "share of the answers", title, SMALL)
    samples = [[float(value) for value in sample if math.isfinite(value)] for sample in (first, second)]
    pooled = samples[0] + samples[1]
    if pooled:
        low = min(pooled)
        width = (max(pooled) - low or 1.0) / 24
        # Bins of integers have an integer width, or unequal numbers of integers in them would show as stripes.
        if width > 1 / 24 and all(value.is_integer() for value in pooled):
            width = math.ceil((max(pooled) - low + 1) / 24)
            low -= 0.5
        edges = [low + width * i for i in range(25)]
        for i, (sample, label) in enumerate(zip(samples, labels, strict=True)):
            weights = [1 / len(sample)] * len(sample) if sample else None
            ax.hist(sample, edges, weights=weights, color=COLOURS[i], alpha=0.55, label=label)
        format_axes(ax)
        add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """Add a legend to a figure below the plot, where it covers no line."""
    legend = figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
