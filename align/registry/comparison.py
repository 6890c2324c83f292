"""Comparison of runs in a table: the settings in which they differ, and their metrics.

Runs that differ only in their seed are one row, with the mean over them. The runs of a sweep made by `-m` are noted in
`compare/` of the folder of runs, beside the sweep's page.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, InputError, MissingArtifact, require_schema_version
from align.core.outputs import refuse_foreign_file
from align.registry.differences import RUNS, describe_inputs, get_settings
from align.registry.formatting import clean_text, format_cell, get_value, iter_leaves, to_csv
from align.registry.record import MOVED, UNREADABLE, Record, describe_alteration, get_number, to_strict_json
from align.report.figure_labels import sort_metric_names
from align.report.figure_text import align_columns, escape_unprintable, flatten_metrics, is_interval, pluralize
from align.run.files import read_json_object, write_json
from align.run.manifest import read_manifest

SEED = "seed"
CODE = "code"
COST = ("minutes", "peak_memory_mb", "tokens")
"""Keys of a record's `cost` that are compared as metrics."""
LOW = ("loss", "perplexity", *MOVED, *COST)
"""Prefixes of metrics for which lower is better."""
HIGH = ("win_rate", "accuracy", "held_out_score", "last_score", "score")
"""Prefixes of metrics for which higher is better."""
SHARES = ("rate", "accuracy")
"""Suffixes of metrics that lie between 0 and 1, to which their intervals are cut."""
FIGURES = 4
"""Largest number of metrics in a printed table besides the main metric of each stage."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One row of a comparison: runs that differ only in their seed, with the mean of each metric over them.

    Attributes:
        records: their records.
        settings: key → value, of the keys in which the rows differ.
        by_seed: seed → metrics of its first run.
        figures: name → number or interval: the run's own, or over several seeds that of their mean.
    """

    records: tuple[Record, ...]
    settings: Mapping[str, Any]
    by_seed: Mapping[int, Mapping[str, Any]]
    figures: Mapping[str, Any]

    @property
    def runs(self) -> list[str]:
        return [record["run"] for record in self.records]

    @property
    def seeds(self) -> list[int]:
        return sorted(self.by_seed)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of runs as a table: rows of runs, the settings in which they differ, and their metrics.

    Attributes:
        keys: settings in which they differ; for runs of several stages, of the settings that all of them have.
        inputs: those of the keys that are inputs.
        scores: main metrics.
        figures: other metrics that every row has and that differ, the most important first.
        left_out: number of settings that only some of the stages have.
    """

    rows: tuple[ComparisonRow, ...]
    keys: tuple[str, ...]
    inputs: frozenset[str]
    scores: tuple[str, ...]
    figures: tuple[str, ...]
    left_out: int

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(record["stage"] for row in self.rows for record in row.records))


def compare(root: Path, records: Sequence[Record], figure_keys: Sequence[str] = ()) -> Comparison:
    """Build a table of runs with the settings in which they differ and their metrics, or only the metrics
    `figure_keys`.

    Runs that differ only in their seed become one row.

    Args:
        root: the folder of all runs.
        records: their records, see `align.registry.record`.
        figure_keys: keys of records to compare instead of the usual metrics.

    Raises:
        InputError: A run cannot be read.
    """
    settings: list[dict[str, Any]] = []
    for record in records:
        if record["status"] == UNREADABLE:
            raise InputError(RUNS, record["run"], f"cannot be read: {record['error']}", "Leave it out.")
        manifest = read_manifest(root / record["folder"])
        # The result of a run depends on its settings, its inputs by digest, and the code.
        settings.append(to_strict_json(get_settings(manifest) | describe_inputs(record) | {CODE: manifest.code[:8]}))
    all_keys = list(dict.fromkeys(key for values in settings for key in values))
    common = all_keys
    if len({record["stage"] for record in records}) > 1:
        # A learning rate of SFT cannot be compared with one of PPO.
        shared = [key for key in all_keys if key == "stage.name" or not key.startswith("stage.")]
        common = [key for key in shared if all(key in values for values in settings)]
    differing = [key for key in common if any(values.get(key) != settings[0].get(key) for values in settings)]
    groups: dict[str, list[int]] = {}
    for i, (record, values) in enumerate(zip(records, settings, strict=True)):
        without_seed = {key: value for key, value in values.items() if key != SEED}
        own_row = "" if record["status"] == "done" else record["run"]
        groups.setdefault(json.dumps([without_seed, own_row], sort_keys=True, default=str), []).append(i)
    keys = [key for key in differing if key not in (SEED, CODE)] + [key for key in (SEED, CODE) if key in differing]
    # Different measures of the distance from the start cannot be compared: take one that all done runs have.
    metrics = [record["metrics"] for record in records if record["status"] == "done"]
    distance = ""
    if metrics:
        common_measures = (key for key in MOVED if all(get_number(values.get(key)) is not None for values in metrics))
        distance = next(common_measures, "")
    rows = []
    for group in groups.values():
        row_records = sorted((records[i] for i in group), key=lambda record: record["seed"])
        by_seed = {
            record["seed"]: collect_figures(record, figure_keys, distance)
            for record in keep_first_per_seed(row_records)
        }
        row_settings = {key: settings[group[0]].get(key) for key in keys if key != SEED}
        rows.append(ComparisonRow(tuple(row_records), row_settings, by_seed, average_figures([*by_seed.values()])))
    scores = tuple(figure_keys)
    if not scores:
        names: list[str] = [record["score"]["name"] for record in records if record.get("score")]
        scores = tuple(dict.fromkeys([*names, distance] if distance else names))
    inputs = frozenset(key for record in records for key in describe_inputs(record))
    return Comparison(
        tuple(rows), tuple(keys), inputs, scores, select_figures(rows, scores), len(all_keys) - len(common)
    )


def is_lower_better(name: str) -> bool | None:
    """Return True if a lower value of a metric is better, False if a higher one is, and None if unknown."""
    name = name.removeprefix("metrics.").removeprefix("cost.").removesuffix(".value")
    low, high = (name.startswith(prefixes) for prefixes in (LOW, HIGH))
    return low if low != high else None


def keep_first_per_seed(records: Sequence[Record]) -> list[Record]:
    """Return the records without repeated seeds, keeping the first record of each seed.

    A repeated run says nothing about the spread over seeds.
    """
    return list({record["seed"]: record for record in reversed(records)}.values())[::-1]


def collect_figures(record: Record, figure_keys: Sequence[str], distance: str) -> dict[str, Any]:
    """Return name → value for a run's costs and its metrics (all, or only `figure_keys`) that are numbers or intervals.

    Args:
        figure_keys: keys of the record to return besides the costs; empty for all metrics.
        distance: name of the metric for the distance from the run's start, which is returned as well.
    """
    cost = {name: record["cost"][name] for name in COST}
    if figure_keys:
        figures = {key: get_value(record, key) for key in figure_keys}
        figures |= {distance: record["metrics"].get(distance), **cost}
    else:
        figures = {**dict(flatten_metrics(record["metrics"])), **cost}
        for name in ("peak_rss_mb", "peak_gpu_mb", "predicted_peak_mb"):  # covered by the cost
            figures.pop(name, None)
    return {name: value for name, value in figures.items() if get_number(value) is not None}


def average_figures(run_figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each metric over runs with different seeds, with a 95 % interval; a single run's metrics stay
    as they are.

    For several runs these are means over the runs that have the metric, with intervals. `n` is the number of these runs
    if some lack it.
    """
    if len(run_figures) == 1:
        return dict(run_figures[0])
    figures: dict[str, Any] = {}
    for name in dict.fromkeys(name for figures_of_run in run_figures for name in figures_of_run):
        values = [get_figure_value(figures_of_run[name]) for figures_of_run in run_figures if name in figures_of_run]
        are_equal = len({*values}) == 1 and len(values) == len(run_figures)
        figures[name] = values[0] if are_equal else average_values(name, values)
        if len(values) < len(run_figures):
            figures[name]["n"] = len(values)
    return figures


def average_values(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of a metric over several seeds and its 95 % interval, as `value`, `low` and
    `high`.

    The interval of a rate or an accuracy is cut to 0 and 1.
    """
    from align.ops.intervals import mean_interval  # it needs NumPy

    estimate = mean_interval(values)
    low = estimate.low
    high = estimate.high
    if name.removesuffix(".value").endswith(SHARES) and low is not None and high is not None:
        low = max(0.0, low)
        high = min(1.0, high)
    return {"value": estimate.value, "low": low, "high": high}


def get_figure_value(figure: Any) -> float:
    """Return the number of a metric that is either a number or an interval."""
    return figure["value"] if isinstance(figure, Mapping) else figure


def select_figures(rows: Sequence[ComparisonRow], scores: Sequence[str]) -> tuple[str, ...]:
    """Return the names of metrics that all rows with metrics have and that differ between rows, except the main
    ones."""
    all_figures = [row.figures for row in rows if row.figures]
    if not all_figures:
        return ()
    common = [name for name in all_figures[0] if name not in scores and all(name in values for values in all_figures)]
    differing = [name for name in common if len({get_figure_value(values[name]) for values in all_figures}) > 1]
    return (
        *(name for name in sort_metric_names(differing) if name not in COST),
        *(name for name in COST if name in differing),
    )


def format_settings(compared: Comparison) -> list[dict[str, str]]:
    """Return one mapping per row, from each differing setting and `seed` to its text.

    An input has no digest if its name identifies it.
    """
    rows = [
        {key: format_cell(value) for key, value in row.settings.items()} | {SEED: ", ".join(map(str, row.seeds))}
        for row in compared.rows
    ]
    for key in compared.inputs.intersection(compared.keys):
        digests_by_name: dict[str, set[str]] = {}
        for row in rows:
            name, _, digest = row.get(key, "").rpartition(" (")
            digests_by_name.setdefault(name, set()).add(digest)
        if "" not in digests_by_name and all(len(digests) == 1 for digests in digests_by_name.values()):
            for row in rows:
                row[key] = row[key].rpartition(" (")[0]
    return rows


def as_lines(compared: Comparison, width: int | None = None) -> Iterator[str]:
    """Yield a comparison as lines of text: a table with as many metrics as fit into `width`, and notes below it.

    Args:
        width: columns of the terminal, which limit the number of further metrics; None for no limit.
    """
    count = min(FIGURES, len(compared.figures))
    lines = [*align_columns(build_cells(compared, count))]
    while count and width is not None and max(map(len, lines)) > width:
        count -= 1
        lines = [*align_columns(build_cells(compared, count))]
    yield from lines
    yield from iter_notes(compared, len(compared.figures) - count)


def build_cells(compared: Comparison, figure_count: int) -> list[list[str]]:
    """Return the cells of a comparison's table as text: a header line, then one line per row.

    Args:
        figure_count: number of metrics besides the scores.
    """
    unfinished = any(row.records[0]["status"] != "done" for row in compared.rows)
    figures = [*compared.scores, *compared.figures[:figure_count]]
    lines = [["run", *(["status"] if unfinished else []), *compared.keys, *figures]]
    for row, settings in zip(compared.rows, format_settings(compared), strict=True):
        more = f" +{len(row.runs) - 1}" if len(row.runs) > 1 else ""
        status = [clean_text(row.records[0]["status"])] if unfinished else []
        values = [
            *(clean_text(settings[key]) for key in compared.keys),
            *(format_cell(row.figures.get(name)) for name in figures),
        ]
        lines.append([clean_text(row.runs[0]) + more, *status, *values])
    return lines


def list_alterations(compared: Comparison) -> list[str]:
    """Return reasons why metrics in a comparison may differ from the published ones, or an empty list if all agree."""
    problems = (describe_alteration(record) for row in compared.rows for record in row.records)
    return list(dict.fromkeys(filter(None, problems)))


def iter_notes(compared: Comparison, hidden_count: int) -> Iterator[str]:
    """Yield the notes below a comparison's table, such as that a run was altered or that settings are left out.

    Args:
        hidden_count: number of metrics that the table does not show.
    """
    yield from (f"ALTERED: {escape_unprintable(problem)}" for problem in list_alterations(compared))
    if len(compared.rows) == 1 and len(compared.rows[0].records) == 1:
        yield "one run alone"
    elif not compared.keys:
        yield "no setting differs"
    if any(len(row.by_seed) > 1 for row in compared.rows):
        yield "Of several seeds: the mean over them, with its 95 % interval."
    if compared.left_out:
        yield f"{pluralize(compared.left_out, 'setting')} left out, which only some of these stages have"
    if hidden_count:
        yield f"{pluralize(hidden_count, 'figure')} more that differ: stage.format=json, or stage.html=FILE"


def as_objects(compared: Comparison) -> dict[str, Any]:
    """Return a comparison as plain JSON, with the settings and all metrics of each row."""
    return {
        "keys": [key for key in compared.keys if key != SEED],
        "scores": list(compared.scores),
        "settings_of_some": compared.left_out,
        "altered": list_alterations(compared),
        "rows": [
            {
                "runs": row.runs,
                "status": row.records[0]["status"],
                "seeds": row.seeds,
                "settings": to_strict_json(row.settings),
                "figures": to_strict_json(row.figures),
            }
            for row in compared.rows
        ],
    }


def as_csv(compared: Comparison) -> str:
    """Return a comparison as CSV text, with one line per row and separate columns for an interval's bounds."""
    rows = []
    for row in as_objects(compared)["rows"]:
        identity = {"runs": " ".join(row["runs"]), "status": row["status"], "seeds": " ".join(map(str, row["seeds"]))}
        intervals = {name: value if is_interval(value) else {"value": value} for name, value in row["figures"].items()}
        figures = {key.removesuffix(".value"): value for key, value in iter_leaves(intervals)}
        rows.append({**identity, **row["settings"], **figures, **identity})  # even if a metric has such a name
    return to_csv(list(dict.fromkeys(key for row in rows for key in row)), rows)


SWEEPS = "compare"
SCHEMA = 1
SWEEP = "stage.sweep"


def write_sweep_note(root: Path, name: str, runs: list[str]) -> None:
    """Write the names of a sweep's runs to the file `compare/NAME.json` in the folder of all runs.

    Args:
        root: the folder of all runs.
        name: name of the sweep.
        runs: each as `stage:name`.
    """
    path = root / SWEEPS / f"{name}.json"
    refuse_foreign_file(path, "run.root", is_sweep_note)
    write_json(path, {"schema_version": SCHEMA, "runs": runs})


def is_sweep_note(data: bytes) -> bool:
    """Return whether a file's content is JSON with exactly the keys of a sweep's note."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() == {"schema_version", "runs"}


def list_sweep_runs(root: Path, sweep_name: str) -> list[str]:
    """Return the names of a sweep's runs, as `stage:name`, from its note in `compare/`.

    Args:
        root: the folder of all runs.
        sweep_name: name of the sweep, or `latest`.

    Raises:
        MissingArtifact: There is no such sweep. The message names the most similar one.
        InputError: Another version wrote its note.
        CorruptFile: Its note names no runs.
    """
    paths = {path.stem: path for path in (root / SWEEPS).glob("*.json") if path.is_file()}
    newest = max(paths, key=lambda name: (paths[name].stat().st_mtime_ns, name), default=None)
    name = newest if sweep_name == "latest" else sweep_name
    if name is None or name not in paths:
        similar = difflib.get_close_matches(sweep_name, paths, n=1)
        hint = f"Did you mean {similar[0]}? " if similar else ""
        remedy = f"{hint}A sweep (-m) of two runs that are done leaves one."
        raise MissingArtifact(SWEEP, sweep_name, f"is no sweep under {root}", remedy)
    path = paths[name]
    note = read_json_object(path, SWEEP, "Name its runs by stage.runs.")
    require_schema_version(note.get("schema_version"), SCHEMA, SWEEP, str(path), "Name its runs by stage.runs.")
    runs = note.get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
        raise CorruptFile(SWEEP, sweep_name, f"{path} does not say which runs it compares", "Name them by stage.runs.")
    return runs
