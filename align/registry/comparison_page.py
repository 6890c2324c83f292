"""A comparison as one page that needs nothing beside it: the table, what a score costs, the curves over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from align.registry.comparison import (
    MOVED,
    SEED,
    Comparison,
    Row,
    altered_in_rows,
    better_low,
    comparison,
    once_a_seed,
    shown_settings,
    value_of,
)  # fmt: skip
from align.registry.index import asked
from align.registry.ranking import bounded, said_first
from align.registry.shown import NOTHING
from align.registry.sweeps import FOLDER, note_sweep
from align.report.curves import CURVES, UNITS, Curve
from align.report.page import Report
from align.report.plots import Point, curves, points_of, tradeoff, undominated
from align.report.stages import course
from align.report.words import counted, format_figure
from align.run.digests import json_digest
from align.track import read_rows

DRAWN = 8
"""Rows whose curves are drawn over each other; of more nobody could tell them apart."""
FURTHER = 8
"""Figures that the table has besides the scores and the costs."""
PRICES = {**dict.fromkeys(MOVED, "KL from the start"), "minutes": "minutes", "peak_memory_mb": "peak memory, MB"}
"""Figure → what it is called, of those that a score is held against."""


def page_of(found: Comparison, root: Path) -> Report:
    """The page.

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
    report.verdict(said_first(found, labels))
    table(report, found, labels)
    main = next((name for name in found.scores if name not in PRICES and better_low(name) is not None), None)
    for price, called in PRICES.items():
        if main:
            price_shown(report, found, labels, main, price, called)
    curves_shown(report, found, labels, root)
    return report


def sweep_page(folders: Sequence[Path]) -> Path | None:
    """The page of the runs of a sweep, written to `compare/` in the folder of all runs; None of fewer than two, or
    where they lie under several roots.

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
    into = root / FOLDER
    into.mkdir(exist_ok=True)
    name = f"{stages}-{json_digest(sorted(runs))[:8]}"
    page = page_of(comparison(root, records), root).write(into / f"{name}.html", "run.root")
    note_sweep(root, name, runs)
    return page


def labels_of(found: Comparison) -> list[str]:
    """What each row is called in legends: its number in the table, and what it has of its own."""
    leaf = {key: key.rpartition(".")[2] for key in found.keys}
    short = {key: name if [*leaf.values()].count(name) == 1 else key for key, name in leaf.items()}
    labels = []
    for i, (row, settings) in enumerate(zip(found.rows, shown_settings(found), strict=True), 1):
        own = ", ".join(f"{short[key]} {value}" for key, value in settings.items() if key != "code")
        text = own if own and len(own) <= 40 else row.runs[0]
        labels.append(f"{i} ({text})")
    return labels


def table(report: Report, found: Comparison, labels: Sequence[str]) -> None:
    cost = [name for name in found.figures if name in PRICES]
    figures = [*found.scores, *[name for name in found.figures if name not in cost][:FURTHER], *cost]
    rows = []
    for i, (row, settings) in enumerate(zip(found.rows, shown_settings(found), strict=True), 1):
        seeds = {SEED: ", ".join(map(str, row.seeds))}
        cells = [(settings | seeds)[key] for key in found.keys]
        status = row.records[0]["status"]
        runs = "\n".join(row.runs) if status == "done" else f"{row.runs[0]}\n({status})"
        values = (row.figures.get(name) for name in figures)
        rows.append([str(i), runs, *cells, *(NOTHING if value is None else format_figure(value) for value in values)])
    report.table(["row", "run", *found.keys, *figures], rows, "Settings that differ, and figures")
    for problem in altered_in_rows(found):
        report.text(f"Altered: {problem}.")
    if any(len(row.records) > 1 for row in found.rows):
        report.text("Of several seeds: the mean over them, with its 95 % interval by Student's t.")
    if found.apart:
        report.text(f"{counted(found.apart, 'setting')} left out, which only some of these stages have.")


def price_shown(report: Report, found: Comparison, labels: Sequence[str], score: str, price: str, called: str) -> None:
    """One figure against what it costs, where at least two rows have both."""
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
    """Value, low and high of a figure; three times the value where it has no interval."""
    figure = row.figures[name]
    value = float(value_of(figure))
    if not bounded(figure):
        return value, value, value
    return value, float(figure["low"]), float(figure["high"])


def curves_shown(report: Report, found: Comparison, labels: Sequence[str], root: Path) -> None:
    """Each curve of the stage, the rows over each other; none where the runs are of several stages."""
    if len(found.stages) != 1 or found.stages[0] not in CURVES:
        return
    drawn = list(enumerate(found.rows))[:DRAWN]
    streams = {
        i: [read_rows(root / record["folder"] / "metrics.jsonl") for record in once_a_seed(row.records)]
        for i, row in drawn
    }
    if len(found.rows) > DRAWN:
        report.text(f"The curves are those of the first {DRAWN} rows.")
    for curve in CURVES[found.stages[0]]:
        for key, line in curve.lines.items():
            lines = {i: over_seeds([points_of(stream, key) for stream in streams[i]]) for i, _ in drawn}
            one_curve(report, curve, line, {i: found for i, found in lines.items() if found}, labels, found.stages[0])


def over_seeds(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of several lines, at the steps that all of them have."""
    values: dict[float, list[float]] = {}
    for line in lines:
        for step, value in dict(line).items():
            values.setdefault(step, []).append(value)
    return [(step, sum(ys) / len(ys)) for step, ys in sorted(values.items()) if len(ys) == len(lines)]


def one_curve(
    report: Report, curve: Curve, line: str, lines: Mapping[int, Sequence[tuple[float, float]]],
    labels: Sequence[str], stage: str,
) -> None:  # fmt: skip
    """One figure of several rows over the steps, where one of them is a curve."""
    if max(map(len, lines.values()), default=0) < 2:
        return
    unit = UNITS.get(stage, "step")
    title = curve.title if len(curve.lines) == 1 else f"{curve.title}, {line}"
    rows = [{"step": x, str(i): y} for i, points in lines.items() for x, y in points]
    legend = {str(i): labels[i] for i in lines}
    said = "; ".join(course(labels[i], points, unit) for i, points in lines.items())
    report.draw(
        lambda: curves(rows, legend, curve.unit, title, unit, curve.span, curve.within, smooth=curve.smooth),
        curve.reading,
        f"{title} over {unit}s. {said}.",
    )
