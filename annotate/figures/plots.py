"""Plots of what `figures` returns, as bytes of an SVG without a ground of its own, for a page that fits both schemes.
Names in them are pseudonyms, never identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from align.report import few
from align.report.plots import COLOURS, INK, axes, render

DAYS = 7
"""Shown at least: a single bar as wide as the plot would say nothing."""


def per_day(figures: Mapping[str, Any]) -> bytes:
    """Plot the votes of each UTC day, stacked: rankings by people, simulated ones, skips."""
    figure, ax = axes("", "votes", "Votes per day (UTC)")
    rows = figures["per_day"]
    days = [date.fromisoformat(row["day"]).toordinal() for row in rows]
    below = [0] * len(rows)
    for colour, name in zip(COLOURS, ("people", "simulated", "skips"), strict=False):
        counts = [row[name] for row in rows]
        if any(counts):
            ax.bar(days, counts, bottom=below, color=colour, width=0.8, label=name)
            below = [low + count for low, count in zip(below, counts, strict=True)]
    _whole(ax)
    if rows:
        first, last = days[0], max(days[-1], days[0] + DAYS - 1)
        ticks = range(first, last + 1, 1 + (last - first) // 4)
        ax.set_xticks(ticks, [date.fromordinal(day).isoformat() for day in ticks])
        ax.set_xlim(first - 0.6, last + 0.6)
        ax.tick_params(axis="x", pad=8)  # clear of the zero
        above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 3}  # where no bar is
        ax.legend(frameon=False, fontsize=8, labelcolor=INK, borderpad=0, **above)
    else:
        _say(ax, "no votes yet")
    return render(figure, transparent=True)


def seconds(figures: Mapping[str, Any]) -> bytes:
    """Plot a histogram of the seconds that a ranking took; its bins are wider the longer that is."""
    found = figures["seconds"]
    figure, ax = axes("seconds", "rankings", "Seconds per item")
    bins = found["histogram"]
    ax.bar(range(len(bins)), [bin["count"] for bin in bins], width=0.9, align="edge", color=COLOURS[0])
    ax.set_xticks(range(len(bins)), [str(bin["from"]) for bin in bins], fontsize=8)
    _whole(ax)
    if not found["n"]:
        _say(ax, "no times yet")
    return render(figure, transparent=True)


def position(figures: Mapping[str, Any]) -> bytes:
    """Plot how often the answer that stood earlier on the screen won, by annotator and over all."""
    return _forest(figures, "position", "share won by the earlier answer", "Position bias")


def length(figures: Mapping[str, Any]) -> bytes:
    """Plot how often the longer answer won, likewise."""
    return _forest(figures, "length", "share won by the longer answer", "Length bias")


def _forest(figures: Mapping[str, Any], name: str, xlabel: str, title: str) -> bytes:
    """Plot shares with their intervals, one below the other, all of them at the bottom; ½ is dashed."""
    shares = [(person["pseudonym"], person[name]["share"]) for person in figures["people"]]
    rows = [(who, found) for who, found in (*shares, ("all", figures[name]["share"])) if isinstance(found, Mapping)]
    figure, ax = axes(xlabel, "", title)
    figure.set_figheight(max(3.0, 1.2 + 0.22 * len(rows)))
    ax.grid(visible=False)
    for place, (who, found) in enumerate(rows):
        colour, mark = (INK, "D") if who == "all" else (COLOURS[0], "o")
        ax.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.6)
        ax.plot(found["value"], place, mark, color=colour, markersize=5)
    ax.set_yticks(
        range(len(rows)), [f"{who} ({found['n']:,}{few(found['n'])})" for who, found in rows], parse_math=False
    )
    ax.set_xlim(0, 1)
    ax.set_ylim(max(len(rows), 5) - 0.5, -0.5)  # the first on top
    if rows:
        ax.axvline(0.5, color=INK, linestyle="--", linewidth=1)
    else:
        _say(ax, "nothing to count yet")
    return render(figure, transparent=True)


def _whole(ax: Axes) -> None:
    """Counts are whole numbers, and there are none below zero."""
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.set_ylim(0, max(1, ax.get_ylim()[1]))


def _say(ax: Axes, words: str) -> None:
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", color=INK, fontsize=10)
