"""Which of several rows of a comparison is best, and how sure that is: said in sentences, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.registry.comparison import MOVED, Comparison, Row, better_low, value_of
from align.report.words import counted, format_figure, is_bounded, is_interval

MEASURED_ON = ("data.", "data", "eval_data", "reward", "reward.", "stage.held_out", "stage.eval_", "stage.name")
"""Beginnings of settings under which figures are not of the same thing."""
NAMED = 5


def said_first(found: Comparison, labels: Sequence[str]) -> str:
    """The best row by the first score, and which others may be as good. Nothing is ranked that was not measured alike.

    Args:
        labels: what each row is called.
    """
    name = next((score for score in found.scores if score not in MOVED), None)
    low = None if name is None else better_low(name)
    having = [i for i, row in enumerate(found.rows) if name in row.figures]
    if name is None or low is None or not having:
        return "Nothing here says which of these is better."
    if unlike := measured_unlike(found, name):
        return f"Not ranked by {name}: it was not measured alike ({', '.join(unlike)})."
    best = min(having, key=lambda i: value_of(found.rows[i].figures[name]) * (1 if low else -1))
    figure = format_figure(found.rows[best].figures[name])
    said = f"{'Lowest' if low else 'Highest'} {name}: row {labels[best]}, {figure}."
    others = [i for i in having if i != best]
    doubtful = [labels[i] for i in others if not surely(found.rows[best], found.rows[i], name, low)]
    if not others:
        return said
    if not doubtful:
        second = "every other row" if len(others) > 1 else f"row {labels[others[0]]}"
        return f"{said} It is better than {second} beyond chance."
    more = f" and {counted(len(doubtful) - NAMED, 'more row')}" if len(doubtful) > NAMED else ""
    return f"{said} As good may be, but for chance: row {'; row '.join(doubtful[:NAMED])}{more}."


def measured_unlike(found: Comparison, name: str) -> list[str]:
    """The settings in which the rows differ that change what a score is a score of; the judge among them."""
    keys = [key for key in found.keys if key.startswith(MEASURED_ON)]
    records = [record for row in found.rows for record in row.records if name in record["metrics"]]
    judges = {str(record["metrics"].get("judge")) for record in records}
    return [*keys, *(["judge"] if name == "win_rate" and len(judges) > 1 else [])]


def surely(best: Row, other: Row, name: str, low: bool) -> bool:
    """Whether one row is better than another beyond chance, at 95 %. Where both have two or more seeds in common, by
    the differences seed by seed. Elsewhere by intervals that do not touch, both over seeds or both over what was asked.
    """
    seeds = [seed for seed in best.by_seed if name in best.by_seed[seed] and name in other.by_seed.get(seed, {})]
    if len(seeds) > 1:
        from align.ops.intervals import mean  # it needs NumPy

        gains = [value_of(best.by_seed[seed][name]) - value_of(other.by_seed[seed][name]) for seed in seeds]
        found = mean(gains)
        if found.low is None or found.high is None:  # all alike: by the very same amount
            return (found.value < 0) if low else (found.value > 0)
        return found.high < 0 if low else found.low > 0
    if (len(best.by_seed) > 1) != (len(other.by_seed) > 1):
        return False
    ours, theirs = best.figures[name], other.figures[name]
    if not (bounded(ours) and bounded(theirs)):
        return False
    return ours["high"] < theirs["low"] if low else ours["low"] > theirs["high"]


def bounded(figure: Any) -> bool:
    return is_interval(figure) and is_bounded(figure)
