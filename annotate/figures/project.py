"""Everything that a project's votes say, as one JSON-ready object."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from align.annotate.figures.agreement import (
    NO_STRENGTHS,
    Panel,
    alpha,
    kappas,
    panels,
    ranked_by_contradictions,
    raw_agreement,
)
from align.annotate.figures.bias import length_bias, position_bias
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import CEILING_S, UNMEASURED, as_csv, people, skipped, ties
from align.annotate.figures.view import View, read
from align.annotate.store import Store

SECONDS = (0, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)
"""Where the bins of the histogram of seconds per item begin; the last has no end."""


def figures(store: Store, project: str) -> dict[str, Any]:
    """As `figures_of`, of all that there is by now.

    Raises:
        InputError: unknown project.
    """
    return figures_of(read(store, project), project)


def figures_of(view: View, project: str) -> dict[str, Any]:
    """The project's figures: numbers, texts, None, lists and objects alone; what is undefined is a text that says why.

    Disagreements are those that no reviewer has settled.

    `totals`, `hours`, `per_day`, `seconds`, `agreement`, `position`, `length`, `people` and `disagreements`. An
    interval is `{value, low, high, n}`, at 95 %; n counts what is independent: items, or votes. Votes count that
    stand: not retracted, their item not erased.
    Agreement, biases and disagreements are of *work*, without gold items and repeats. Simulated votes count; `totals`
    says how many there are.
    """
    work, everyone = view.work, people(view)
    directions = panels(work, view.candidates)
    strengths = panels(work, view.candidates, strength=True)
    return as_json(
        {
            "project": project,
            "totals": totals(view),
            "hours": {"total": sum(person.hours for person in everyone), "ceiling_seconds": CEILING_S},
            "per_day": per_day(view),
            "seconds": seconds(view),
            "agreement": {
                "items": len(directions),
                "pairs": sum(panel.values_RU.shape[1] for panel in directions),
                "alpha": alpha(directions, "nominal"),
                "alpha_strength": alpha(strengths, "ordinal") if strengths else NO_STRENGTHS,
                "raw": raw_agreement(directions),
                "kappas": kappas(directions, strengths),
            },
            "position": position_bias(work),
            "length": length_bias(work, view.lengths),
            "people": everyone,
            "disagreements": disagreements([panel for panel in directions if panel.item not in view.settled]),
        }
    )


def people_csv(store: Store, project: str) -> str:
    """Hours, counts and shares, a row an annotator; see `people`.

    Raises:
        InputError: unknown project.
    """
    return as_csv(people(read(store, project)))


def totals(view: View) -> dict[str, Any]:
    """Counts of the whole project. An item is done when as many people as it wants have ranked it; gold items want
    nobody and are counted apart."""
    sources, purposes = Counter(), Counter()
    for vote in view.rankings:
        sources[vote.source] += 1
        purposes[vote.purpose] += 1
    wanted = view.wanted
    return {
        "rankings": len(view.rankings),
        "by_people": sources["human"],
        "simulated": sources["simulated"],
        "by_purpose": {purpose: purposes[purpose] for purpose in ("work", "gold", "repeat", "review")},
        "items": len(wanted),
        "items_done": sum(view.judged[item] >= wanted[item] for item in wanted),
        "gold_items": len(view.expected.keys() & view.candidates.keys()),
        "skips": skipped(view.skips),
        "ties": ties(view.rankings),
        "retracted": len(view.retracted),
        "flagged": sum(bool(vote.flagged) for vote in (*view.rankings, *view.skips)),
    }


def per_day(view: View) -> list[dict[str, Any]]:
    """Rankings by people and by their stand-in, and skips, of each UTC day that has any, in order."""
    days: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in (*view.rankings, *view.skips):
        days[vote.created_at[:10]]["skips" if vote.skipped else vote.source] += 1
    return [
        {"day": day, "people": n["human"], "simulated": n["simulated"], "skips": n["skips"]}
        for day, n in sorted(days.items())
    ]


def seconds(view: View) -> dict[str, Any]:
    """How long a ranking took where that was measured: quartiles, and a histogram whose last bin has no end."""
    taken = [vote.seconds for vote in view.rankings if vote.seconds is not None]
    quartiles = np.quantile(taken, (0.25, 0.5, 0.75)).tolist() if taken else [UNMEASURED] * 3
    counts, _ = np.histogram(taken, (*SECONDS, np.inf))
    bins = zip(SECONDS, (*SECONDS[1:], None), counts.tolist(), strict=True)
    return {
        "n": len(taken),
        **dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True)),
        "histogram": [{"from": low, "below": high, "count": count} for low, high, count in bins],
    }


def disagreements(found: Sequence[Panel]) -> list[dict[str, Any]]:
    """The items on which annotators contradict each other, for adjudication, the most contradicted first."""
    return [
        {
            "item": panel.item,
            "contradictions": number,
            "votes": [{"seq": seq, "annotator": who} for seq, who in zip(panel.seqs, panel.annotators, strict=True)],
        }
        for number, panel in ranked_by_contradictions(found)
    ]
