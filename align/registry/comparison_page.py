"""A comparison as one page that needs nothing beside it: the table, which row is best and how sure that is, what a
score costs, the curves over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.registry.comparison import (
    MOVED,
    SEED,
    SWEEPS,
    Comparison,
    Row,
    altered_in_rows,
    better_low,
    compare,
    note_sweep,
    once_a_seed,
    shown_settings,
    value_of,
)
from align.registry.formatting import NOTHING
from align.registry.index import asked
from align.report.curves import CURVES, UNITS, Curve
from align.report.figure_text import counted, format_figure, is_bounded, is_interval
from align.report.page import Report
from align.report.plots import Point, curves, points_of, tradeoff, undominated
from align.report.stages import course
from align.run.digests import json_digest
from align.track import read_rows

DRAWN = 8
"""Rows whose curves are drawn over each other; of more nobody could tell them apart."""
FURTHER = 8
"""Figures that the table has besides the scores and the costs."""
PRICES = {**dict.fromkeys(MOVED, "KL from the start"), "minutes": "minutes", "peak_memory_mb": "peak memory, MB"}
"""Figure → what it is called, of those that a score is held against."""


def build_page(found: Comparison, root: Path) -> Report:
    """Return the page.

    Args:
        root: the folder of all runs, whose metrics streams are read.
    """
    runs = sum(len(row.records) for row in found.rows)
    shown = counted(len(found.rows), "row") if len(found.rows) < runs else ""
    title = f"{counted(runs, 'run')} side by side"
    report = Report(
        title, ", ".join([*found.stages, *([f"{shown}: runs that differ in the seed alone are one"] if shown else [])])
    )
    labels = labels_of(found)
    report.verdict(describe_best(found, labels))
    add_table(report, found)
    main = next((name for name in found.scores if name not in PRICES and better_low(name) is not None), None)
    for price, called in PRICES.items():
        if main:
            add_tradeoff(report, found, labels, main, price, called)
    add_curves(report, found, labels, root)
    return report


def sweep_page(folders: Sequence[Path]) -> Path | None:
    """Return the page of the runs of a sweep, written to `compare/` in the folder of all runs; None of fewer than two,
    or where they lie under several roots.

    Args:
        folders: of done runs.

    Raises:
        InputError: a run cannot be read, or the page cannot be written.
    """
    roots = {folder.parent.parent for folder in folders}
    if len({*folders}) < 2 or len(roots) > 1:
        return None
    (root,) = roots
    runs = list(dict.fromkeys(f"{folder.parent.name}:{folder.name}" for folder in folders))
    records = asked(root, lambda index: [record for run in runs if (record := index.record(run)) is not None])
    stages = "-".join(dict.fromkeys(record["stage"] for record in records))
    into = root / SWEEPS
    into.mkdir(exist_ok=True)
    name = f"{stages}-{json_digest(sorted(runs))[:8]}"
    page = build_page(compare(root, records), root).write(into / f"{name}.html", "run.root")
    note_sweep(root, name, runs)
    return page


def labels_of(found: Comparison) -> list[str]:
    """Return what each row is called in legends: its number in the table, and what it has of its own."""
    leaf = {key: key.rpartition(".")[2] for key in found.keys}
    short = {key: name if [*leaf.values()].count(name) == 1 else key for key, name in leaf.items()}
    labels = []
    for i, (row, settings) in enumerate(zip(found.rows, shown_settings(found), strict=True), 1):
        own = ", ".join(f"{short[key]} {value}" for key, value in settings.items() if key not in (SEED, "code"))
        text = own if own and len(own) <= 40 else row.runs[0]
        labels.append(f"{i} ({text})")
    return labels


def add_table(report: Report, found: Comparison) -> None:
    cost = [name for name in found.figures if name in PRICES]
    figures = [*found.scores, *[name for name in found.figures if name not in cost][:FURTHER], *cost]
    rows = []
    for i, (row, settings) in enumerate(zip(found.rows, shown_settings(found), strict=True), 1):
        status = row.records[0]["status"]
        runs = "\n".join(row.runs) if status == "done" else f"{row.runs[0]}\n({status})"
        values = (row.figures.get(name) for name in figures)
        cells = [settings[key] for key in found.keys]
        rows.append([str(i), runs, *cells, *(NOTHING if value is None else format_figure(value) for value in values)])
    report.table(["row", "run", *found.keys, *figures], rows, "Settings that differ, and figures")
    for problem in altered_in_rows(found):
        report.text(f"Altered: {problem}.")
    if any(len(row.records) > 1 for row in found.rows):
        report.text("Of several seeds: the mean over them, with its 95 % interval by Student's t.")
    if found.apart:
        report.text(f"{counted(found.apart, 'setting')} left out, which only some of these stages have.")


def add_tradeoff(report: Report, found: Comparison, labels: Sequence[str], score: str, price: str, called: str) -> None:
    """Add one figure against what it costs, if at least two rows have both."""
    if price == score:
        return
    points = [
        Point(str(i), interval(row, price), interval(row, score))
        for i, row in enumerate(found.rows, 1) if price in row.figures and score in row.figures
    ]  # fmt: skip
    if len(points) < 2:
        return
    best = undominated(points, low=bool(better_low(score)))
    names = ", ".join(labels[int(point.label) - 1] for point in best)
    better = "Low" if better_low(score) else "High"
    numbers = "Numbers are those of the table."
    reading = f"{better} and left is better; by their means no row beats the orange ones in both. {numbers}"
    alt = f"{score} against {called} of {counted(len(points), 'row')}. No other one beats in both: {names}."
    report.draw(lambda: tradeoff(points, best, called, score), reading, alt)


def interval(row: Row, name: str) -> tuple[float, float, float]:
    """Return value, low and high of a figure; three times the value if it has no interval."""
    figure = row.figures[name]
    value = float(value_of(figure))
    if not bounded(figure):
        return value, value, value
    return value, float(figure["low"]), float(figure["high"])


def add_curves(report: Report, found: Comparison, labels: Sequence[str], root: Path) -> None:
    """Add each curve of the stage, the rows over each other; none if the runs are of several stages."""
    if len(found.stages) != 1 or found.stages[0] not in CURVES:
        return
    streams = [
        [read_rows(root / record["folder"] / "metrics.jsonl") for record in once_a_seed(row.records)]
        for row in found.rows[:DRAWN]
    ]
    if len(found.rows) > DRAWN:
        report.text(f"The curves are those of the first {DRAWN} rows.")
    for curve in CURVES[found.stages[0]]:
        for key, line in curve.lines.items():
            lines = [over_seeds([points_of(stream, key) for stream in of_row]) for of_row in streams]
            drawn = {i: points for i, points in enumerate(lines) if points}
            add_curve(report, curve, line, drawn, labels, UNITS.get(found.stages[0], "step"))


def over_seeds(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of several lines, at the steps that all of them have."""
    values: dict[float, list[float]] = {}
    for line in lines:
        for step, value in dict(line).items():
            values.setdefault(step, []).append(value)
    return [(step, sum(ys) / len(ys)) for step, ys in sorted(values.items()) if len(ys) == len(lines)]


def add_curve(
    report: Report,
    curve: Curve,
    line: str,
    lines: Mapping[int, Sequence[tuple[float, float]]],
    labels: Sequence[str],
    unit: str,
) -> None:
    """Add one figure of several rows over the steps, if one of them is a curve."""
    if max(map(len, lines.values()), default=0) < 2:
        return
    title = curve.title if len(curve.lines) == 1 else f"{curve.title}, {line}"
    rows = [{"step": x, str(i): y} for i, points in lines.items() for x, y in points]
    legend = {str(i): labels[i] for i in lines}
    said = "; ".join(course(labels[i], points, unit) for i, points in lines.items())
    report.draw(
        lambda: curves(rows, legend, curve.unit, title, unit, curve.span, curve.within, smooth=curve.smooth),
        curve.reading,
        f"{title} over {unit}s. {said}.",
    )


MEASURED_ON = ("data.", "data", "eval_data", "reward", "reward.", "stage.held_out", "stage.eval_", "stage.name")
"""Beginnings of settings under which figures are not of the same thing."""
NAMED = 5


def describe_best(found: Comparison, labels: Sequence[str]) -> str:
    """Describe the best row by the first score, and which others may be as good. Nothing is ranked that was not
    measured alike.

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
    doubtful = [labels[i] for i in others if not is_better(found.rows[best], found.rows[i], name, low)]
    if not others:
        return said
    if not doubtful:
        second = "every other row" if len(others) > 1 else f"row {labels[others[0]]}"
        return f"{said} It is better than {second} beyond chance."
    more = f" and {counted(len(doubtful) - NAMED, 'more row')}" if len(doubtful) > NAMED else ""
    return f"{said} As good may be, but for chance: row {'; row '.join(doubtful[:NAMED])}{more}."


def measured_unlike(found: Comparison, name: str) -> list[str]:
    """Return the settings in which the rows differ that change what a score is a score of; the judge among them."""
    keys = [key for key in found.keys if key.startswith(MEASURED_ON)]
    records = [record for row in found.rows for record in row.records if name in record["metrics"]]
    judges = {str(record["metrics"].get("judge")) for record in records}
    return [*keys, *(["judge"] if name == "win_rate" and len(judges) > 1 else [])]


def is_better(best: Row, other: Row, name: str, low: bool) -> bool:
    """Return whether one row is better than another beyond chance, at 95 %. If both have two or more seeds in common,
    by the differences seed by seed. Otherwise by intervals that do not touch, both over seeds or both over what was
    asked."""
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
