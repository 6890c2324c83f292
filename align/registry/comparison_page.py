"""The HTML page of a comparison: a table, the best row with its uncertainty, scores against costs, and learning curves.

The page needs no other file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align.registry.comparison import (
    MOVED,
    SEED,
    SWEEPS,
    Comparison,
    ComparisonRow,
    compare,
    format_settings,
    get_figure_value,
    is_lower_better,
    keep_first_per_seed,
    list_alterations,
    write_sweep_note,
)
from align.registry.formatting import NOTHING
from align.registry.index import query_index
from align.report.figure_text import format_figure, is_bounded, is_interval, pluralize
from align.report.page import Report
from align.report.plots import Point, collect_points, draw_curves, draw_tradeoff, find_pareto_front
from align.report.stages import CURVES, UNITS, Curve, describe_line
from align.run.digests import json_digest
from align.track import read_rows

DRAWN = 8
"""Largest number of rows whose learning curves are drawn in one plot."""
FURTHER = 8
"""Largest number of metrics in the page's table besides the main ones and the costs."""
PRICES = {**dict.fromkeys(MOVED, "KL from the start"), "minutes": "minutes", "peak_memory_mb": "peak memory, MB"}
"""Metric that counts as a cost, such as KL or minutes → label of its axis in a plot of the score against it."""


def build_page(compared: Comparison, root: Path) -> Report:
    """Build the HTML page of a comparison: its table, its best row, plots of score against cost, and learning curves.

    Args:
        root: the folder of all runs, whose streams of metrics are read.
    """
    runs = sum(len(row.records) for row in compared.rows)
    subtitle = list(compared.stages)
    if len(compared.rows) < runs:
        subtitle.append(f"{pluralize(len(compared.rows), 'row')}: runs that differ only in the seed share a row")
    report = Report(f"{pluralize(runs, 'run')} side by side", ", ".join(subtitle))
    labels = make_labels(compared)
    report.verdict(describe_best(compared, labels))
    add_table(report, compared)
    main = next((name for name in compared.scores if name not in PRICES and is_lower_better(name) is not None), None)
    for price, price_label in PRICES.items():
        if main:
            add_tradeoff(report, compared, labels, main, price, price_label)
    add_curves(report, compared, labels, root)
    return report


def write_sweep_page(folders: Sequence[Path]) -> Path | None:
    """Write the comparison page and the note of a sweep to `compare/` in the folder of all runs, and return the page's
    path.

    Returns None for fewer than two runs, or if they lie under several roots.

    Args:
        folders: folders of done runs.

    Raises:
        InputError: A run cannot be read, or the page cannot be written.
    """
    roots = {folder.parent.parent for folder in folders}
    if len({*folders}) < 2 or len(roots) > 1:
        return None
    (root,) = roots
    runs = list(dict.fromkeys(f"{folder.parent.name}:{folder.name}" for folder in folders))
    records = query_index(root, lambda index: [record for run in runs if (record := index.record(run)) is not None])
    stages = "-".join(dict.fromkeys(record["stage"] for record in records))
    (root / SWEEPS).mkdir(exist_ok=True)
    name = f"{stages}-{json_digest(sorted(runs))[:8]}"
    page = build_page(compare(root, records), root).write(root / SWEEPS / f"{name}.html", "run.root")
    write_sweep_note(root, name, runs)
    return page


def make_labels(compared: Comparison) -> list[str]:
    """Return a plot label for each row, such as `1 (lr 1e-05)`: its number and its differing settings, or else its
    first run."""
    leaf = {key: key.rpartition(".")[2] for key in compared.keys}
    short = {key: name if [*leaf.values()].count(name) == 1 else key for key, name in leaf.items()}
    labels = []
    for i, (row, settings) in enumerate(zip(compared.rows, format_settings(compared), strict=True), 1):
        text = ", ".join(f"{short[key]} {value}" for key, value in settings.items() if key not in (SEED, "code"))
        labels.append(f"{i} ({text if 0 < len(text) <= 40 else row.runs[0]})")
    return labels


def add_table(report: Report, compared: Comparison) -> None:
    """Append the table of a comparison, with settings and metrics per row, and its notes to a page."""
    cost = [name for name in compared.figures if name in PRICES]
    figures = [*compared.scores, *[name for name in compared.figures if name not in cost][:FURTHER], *cost]
    rows = []
    for i, (row, settings) in enumerate(zip(compared.rows, format_settings(compared), strict=True), 1):
        status = row.records[0]["status"]
        runs = "\n".join(row.runs) if status == "done" else f"{row.runs[0]}\n({status})"
        values = (row.figures.get(name) for name in figures)
        cells = [settings[key] for key in compared.keys]
        rows.append([str(i), runs, *cells, *(NOTHING if value is None else format_figure(value) for value in values)])
    report.table(["row", "run", *compared.keys, *figures], rows, "Settings that differ, and figures")
    for problem in list_alterations(compared):
        report.text(f"Altered: {problem}.")
    if any(len(row.records) > 1 for row in compared.rows):
        report.text("Of several seeds: the mean over them, with its 95 % interval.")
    if compared.left_out:
        report.text(f"{pluralize(compared.left_out, 'setting')} left out, which only some of these stages have.")


def add_tradeoff(
    report: Report, compared: Comparison, labels: Sequence[str], score: str, price: str, price_label: str
) -> None:
    """Append a scatter plot of a score against a cost to a page, with the Pareto front, if at least two rows have both.

    Args:
        labels: label of each row.
        score, price: names of the two metrics.
        price_label: label of the axis of the cost.
    """
    if price == score:
        return
    points = [
        Point(str(i), get_interval(row, price), get_interval(row, score))
        for i, row in enumerate(compared.rows, 1)
        if price in row.figures and score in row.figures
    ]
    if len(points) < 2:
        return
    best = find_pareto_front(points, lower_y_is_better=bool(is_lower_better(score)))
    names = ", ".join(labels[int(point.label) - 1] for point in best)
    better = "Low" if is_lower_better(score) else "High"
    numbers = "Numbers refer to rows of the table."
    reading = f"{better} and left is better; by their means no row beats the orange ones in both. {numbers}"
    alt = f"{score} against {price_label} of {pluralize(len(points), 'row')}. Not beaten in both: {names}."
    report.draw(lambda: draw_tradeoff(points, best, price_label, score), reading, alt)


class MetricInterval(NamedTuple):
    """The value of a metric with the lower and upper bound of its interval."""

    value: float
    low: float
    high: float


def get_interval(row: ComparisonRow, name: str) -> MetricInterval:
    """Return the value and bounds of a row's metric. Without an interval, both bounds are the value."""
    figure = row.figures[name]
    value = float(get_figure_value(figure))
    if not has_bounds(figure):
        return MetricInterval(value, value, value)
    return MetricInterval(value, float(figure["low"]), float(figure["high"]))


def add_curves(report: Report, compared: Comparison, labels: Sequence[str], root: Path) -> None:
    """Append a plot of each learning curve to a page, with one line per row, if all runs are of one stage.

    A line is the mean over the seeds of its row.
    """
    if len(compared.stages) != 1 or compared.stages[0] not in CURVES:
        return
    streams = [
        [read_rows(root / record["folder"] / "metrics.jsonl") for record in keep_first_per_seed(row.records)]
        for row in compared.rows[:DRAWN]
    ]
    if len(compared.rows) > DRAWN:
        report.text(f"The curves are those of the first {DRAWN} rows.")
    for curve in CURVES[compared.stages[0]]:
        for key, line in curve.lines.items():
            lines = [average_lines([collect_points(stream, key) for stream in row_streams]) for row_streams in streams]
            nonempty = {i: points for i, points in enumerate(lines) if points}
            add_curve(report, curve, line, nonempty, labels, UNITS.get(compared.stages[0], "step"))


def average_lines(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of several curves of (step, value) points, at the steps that all of them have."""
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
    """Append a plot of one metric over the steps to a page, with one line per row, if a row has at least two points.

    Args:
        line: name of the metric within the curve.
        lines: index of a row → its points, as (step, value).
        labels: label of each row.
        unit: unit of the steps, such as `step` or `update`.
    """
    if max(map(len, lines.values()), default=0) < 2:
        return
    title = curve.title if len(curve.lines) == 1 else f"{curve.title}, {line}"
    rows = [{"step": x, str(i): y} for i, points in lines.items() for x, y in points]
    legend = {str(i): labels[i] for i in lines}
    courses = "; ".join(describe_line(labels[i], points, unit) for i, points in lines.items())
    report.draw(
        lambda: draw_curves(rows, legend, curve.unit, title, unit, curve.span, curve.within, smooth=curve.smooth),
        curve.reading,
        f"{title} over {unit}s. {courses}.",
    )


MEASURED_ON = ("data.", "data", "eval_data", "reward", "reward.", "stage.held_out", "stage.eval_", "stage.name")
"""Prefixes of settings that decide how a score is measured. Rows that differ in them are not ranked."""
NAMED = 5


def describe_best(compared: Comparison, labels: Sequence[str]) -> str:
    """Return a text that names the best row by the first score, and the rows that may be equally good by chance.

    Rows are not ranked if they were measured in different ways.

    Args:
        labels: name of each row.
    """
    name = next((score for score in compared.scores if score not in MOVED), None)
    lower_is_better = None if name is None else is_lower_better(name)
    candidates = [i for i, row in enumerate(compared.rows) if name in row.figures]
    if name is None or lower_is_better is None or not candidates:
        return "No figure here shows which of these is better."
    if differing := find_measurement_differences(compared, name):
        return f"Not ranked by {name}: it was not measured in the same way ({', '.join(differing)})."
    best = min(
        candidates, key=lambda i: get_figure_value(compared.rows[i].figures[name]) * (1 if lower_is_better else -1)
    )
    figure = format_figure(compared.rows[best].figures[name])
    text = f"{'Lowest' if lower_is_better else 'Highest'} {name}: row {labels[best]}, {figure}."
    other_rows = [i for i in candidates if i != best]
    doubtful = [
        labels[i]
        for i in other_rows
        if not is_significantly_better(compared.rows[best], compared.rows[i], name, lower_is_better)
    ]
    if not other_rows:
        return text
    if not doubtful:
        second = "every other row" if len(other_rows) > 1 else f"row {labels[other_rows[0]]}"
        return f"{text} The difference from {second} is larger than chance explains."
    more = f" and {pluralize(len(doubtful) - NAMED, 'more row')}" if len(doubtful) > NAMED else ""
    return f"{text} The data do not show that it is better than row {'; row '.join(doubtful[:NAMED])}{more}."


def find_measurement_differences(compared: Comparison, name: str) -> list[str]:
    """Return the differing settings that decide how a score is measured, and `judge` if the win rates have different
    judges."""
    keys = [key for key in compared.keys if key.startswith(MEASURED_ON)]
    records = [record for row in compared.rows for record in row.records if name in record["metrics"]]
    judges = {str(record["metrics"].get("judge")) for record in records}
    return [*keys, *(["judge"] if name == "win_rate" and len(judges) > 1 else [])]


def is_significantly_better(best: ComparisonRow, other: ComparisonRow, name: str, lower_is_better: bool) -> bool:
    """Return whether the row `best` is better than `other` by a metric, at 95 % confidence.

    If both have two or more seeds in common, the differences per seed decide. Otherwise their intervals must not
    overlap, both over seeds or both over samples.
    """
    seeds = [seed for seed in best.by_seed if name in best.by_seed[seed] and name in other.by_seed.get(seed, {})]
    if len(seeds) > 1:
        from align.ops.intervals import mean_interval  # it needs NumPy

        gains = [
            get_figure_value(best.by_seed[seed][name]) - get_figure_value(other.by_seed[seed][name]) for seed in seeds
        ]
        gain = mean_interval(gains)
        if gain.low is None or gain.high is None:  # all gains are equal
            return (gain.value < 0) if lower_is_better else (gain.value > 0)
        return gain.high < 0 if lower_is_better else gain.low > 0
    if (len(best.by_seed) > 1) != (len(other.by_seed) > 1):
        return False
    best_figure = best.figures[name]
    other_figure = other.figures[name]
    if not (has_bounds(best_figure) and has_bounds(other_figure)):
        return False
    if lower_is_better:
        return best_figure["high"] < other_figure["low"]
    return best_figure["low"] > other_figure["high"]


def has_bounds(figure: Any) -> bool:
    return is_interval(figure) and is_bounded(figure)
