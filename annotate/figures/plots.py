"""Plots of the result of `compute_figures`, as SVG bytes with a transparent background, for light and dark pages.

Annotators appear by pseudonym, never by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from align.report import note_small_sample
from align.report.plots import COLOURS, INK, create_axes, render_figure

DAYS = 7
"""Minimum number of days on the axis, so that a single bar does not fill the plot."""


def plot_per_day(figures: Mapping[str, Any]) -> bytes:
    """Return an SVG plot of the votes per UTC day as stacked bars: people's rankings, simulated rankings, and skips."""
    figure, ax = create_axes("", "votes", "Votes per day (UTC)")
    rows = figures["per_day"]
    days = [date.fromisoformat(row["day"]).toordinal() for row in rows]
    bottoms = [0] * len(rows)
    for colour, name in zip(COLOURS, ("people", "simulated", "skips"), strict=False):
        counts = [row[name] for row in rows]
        if any(counts):
            ax.bar(days, counts, bottom=bottoms, color=colour, width=0.8, label=name)
            bottoms = [bottom + count for bottom, count in zip(bottoms, counts, strict=True)]
    _use_count_axis(ax)
    if rows:
        first = days[0]
        last = max(days[-1], days[0] + DAYS - 1)
        ticks = range(first, last + 1, 1 + (last - first) // 4)
        ax.set_xticks(ticks, [date.fromordinal(day).isoformat() for day in ticks])
        ax.set_xlim(first - 0.6, last + 0.6)
        ax.tick_params(axis="x", pad=8)  # below the label of zero
        legend_position = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3}  # above the bars
        ax.legend(frameon=False, fontsize=8, labelcolor=INK, borderpad=0, **legend_position)
    else:
        _show_message(ax, "no votes yet")
    return render_figure(figure, transparent=True)


def plot_seconds(figures: Mapping[str, Any]) -> bytes:
    """Return an SVG histogram of the seconds per ranking. Bins get wider with the time."""
    durations = figures["seconds"]
    figure, ax = create_axes("seconds", "rankings", "Seconds per item")
    bins = durations["histogram"]
    ax.bar(range(len(bins)), [bin["count"] for bin in bins], width=0.9, align="edge", color=COLOURS[0])
    ax.set_xticks(range(len(bins)), [str(bin["from"]) for bin in bins], fontsize=8)
    _use_count_axis(ax)
    if not durations["n"]:
        _show_message(ax, "no times yet")
    return render_figure(figure, transparent=True)


def plot_position(figures: Mapping[str, Any]) -> bytes:
    """Return an SVG plot of the share of pairs won by the earlier answer on the screen, by annotator and in total."""
    return _plot_shares(figures, "position", "share won by the earlier answer", "Position bias")


def plot_length(figures: Mapping[str, Any]) -> bytes:
    """Return an SVG plot of the share of pairs won by the longer answer, by annotator and in total."""
    return _plot_shares(figures, "length", "share won by the longer answer", "Length bias")


def _plot_shares(figures: Mapping[str, Any], name: str, xlabel: str, title: str) -> bytes:
    """Return an SVG plot of each annotator's share with its interval, the total last, and a dashed line at ½.

    Args:
        name: of the bias among the figures, `position` or `length`.
    """
    shares = [(person["pseudonym"], person[name]["share"]) for person in figures["people"]]
    rows = [
        (label, estimate)
        for label, estimate in (*shares, ("all", figures[name]["share"]))
        if isinstance(estimate, Mapping)
    ]
    figure, ax = create_axes(xlabel, "", title)
    figure.set_figheight(max(3.0, 1.2 + 0.22 * len(rows)))
    ax.grid(visible=False)
    for y, (label, estimate) in enumerate(rows):
        colour, marker = (INK, "D") if label == "all" else (COLOURS[0], "o")
        ax.plot([estimate["low"], estimate["high"]], [y, y], color=colour, linewidth=1.6)
        ax.plot(estimate["value"], y, marker, color=colour, markersize=5)
    ax.set_yticks(
        range(len(rows)),
        [f"{label} ({estimate['n']:,}{note_small_sample(estimate['n'])})" for label, estimate in rows],
        parse_math=False,
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(max(len(rows), 5) - 0.5, -0.5)  # first row at the top
    if rows:
        ax.axvline(0.5, color=INK, linestyle="--", linewidth=1)
    else:
        _show_message(ax, "nothing to count yet")
    return render_figure(figure, transparent=True)


def _use_count_axis(ax: Axes) -> None:
    """Set the y axis to start at 0 and to have ticks at whole numbers only."""
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.set_ylim(0, max(1, ax.get_ylim()[1]))


def _show_message(ax: Axes, message: str) -> None:
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color=INK, fontsize=10)
