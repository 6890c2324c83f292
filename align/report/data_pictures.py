"""Pictures of a data set's report: what each step removed, how large sources are, and how long their rows are."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from align.report.bars import lying_bars, upright_bars
from align.report.data_counts import SIDES, lost
from align.report.page import Report

DRAWN = 6
"""Sources that have a colour of their own. Where there are more, the last one is all others together."""
CLEANING = "dropped in cleaning"


def draw_removed(report: Report, data: Mapping[str, Any]) -> None:
    """Draw how many rows of each source each step removed."""
    sources = data["sources"]
    removed = {source["name"]: count_removed(source) for source in sources}
    steps = [*dict.fromkeys(step for counts in removed.values() for step in counts)]
    steps = [step for step in steps if any(counts[step] for counts in removed.values())]
    if not steps:
        return
    parts = merge_others({name: [counts[step] for step in steps] for name, counts in removed.items()})
    picture = lying_bars(steps, parts, "rows", "What each step removed")
    summary = "; ".join(f"{step} {sum(counts[step] for counts in removed.values()):,}" for step in steps)
    alt = f"Bars of the rows that each step removed, by source: {summary}."
    report.plot(picture, "Rows that each step removed, by source.", alt)


def count_removed(source: Mapping[str, Any]) -> Counter[str]:
    """Return the rows of a source that each step removed, each cleaning step by its name, in the order of the steps."""
    counts = Counter[str]()
    for why, count in lost(source):
        if why == CLEANING and source["clean"]:
            for step in source["clean"]:
                counts[f"clean: {step['step']}"] += step["dropped"]
        else:
            counts[why] += count
    return counts


def draw_sources(report: Report, data: Mapping[str, Any]) -> None:
    """Draw the rows and the characters of each source that are in the data set."""
    sources = data["sources"]
    names = [source["name"] for source in sources]
    sides = {
        f"to {what}": [source["splits"][side]["rows"] for source in sources]
        for side, what in zip(SIDES, ("train on", "measure on"), strict=True)
    }
    summary = "; ".join(
        f"{name} {sum(rows):,}" for name, rows in zip(names, zip(*sides.values(), strict=True), strict=True)
    )
    picture = lying_bars(names, sides, "rows", "Rows of each source")
    report.plot(picture, "Rows of each source.", f"Bars of the rows of each source: {summary}.")
    characters = data.get("lengths", {}).get("characters")
    if characters is None:  # rows were forgotten since
        return
    parts = {"characters": [characters[name] for name in names]}
    picture = lying_bars(names, parts, "characters", "Text of each source")
    summary = "; ".join(f"{name} {characters[name]:,}" for name in names)
    alt = f"Bars of the characters of each source: {summary}."
    report.plot(picture, "Characters of each source, system prompts left out.", alt)


def draw_lengths(report: Report, lengths: Mapping[str, Any]) -> None:
    """Draw how many rows have how many characters."""
    totals = [sum(counts) for counts in zip(*lengths["counts"].values(), strict=True)]
    used = [i for i, total in enumerate(totals) if total]
    if not used:
        return
    chosen = range(used[0], used[-1] + 1)
    edges = lengths["edges"][used[0] : used[-1] + 2]
    parts = merge_others({name: [counts[i] for i in chosen] for name, counts in lengths["counts"].items()})
    picture = upright_bars([f"{edge:,}" for edge in edges], parts, "characters", "rows", "How long rows are")
    summary = "; ".join(f"{totals[i]:,} from {lengths['edges'][i]:,} to {lengths['edges'][i + 1] - 1:,}" for i in used)
    alt = f"Histogram of the characters of rows, by source: {summary}."
    report.plot(picture, "Rows by their characters; each bar spans twice the one before.", alt)


def merge_others(parts: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the counts of at most `DRAWN` sources, the last of them all others where there are more."""
    named = [(name, [*counts]) for name, counts in parts.items()]
    if len(named) <= DRAWN:
        return dict(named)
    others = [sum(column) for column in zip(*(counts for _, counts in named[DRAWN - 1 :]), strict=True)]
    return dict([*itertools.islice(named, DRAWN - 1), (f"{len(named) - DRAWN + 1} others", others)])
