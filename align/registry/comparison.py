"""Runs side by side: the settings in which they differ, and what came of them. Runs that differ in their seed alone
are one row, with the mean over them. And the sweeps that `-m` made: which runs each of them is, noted beside its page
in `compare/` of the folder of runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, InputError, MissingArtifact, require_schema_version
from align.core.outputs import refuse_foreign_file
from align.registry.differences import RUNS, made_from, settings_of
from align.registry.formatting import cell, clean, csv_of, leaves, value_at
from align.registry.record import MOVED, UNREADABLE, Record, altered_in, finite, number
from align.report.figure_labels import by_weight
from align.report.figure_text import align_columns, counted, flattened, is_interval, one_line
from align.run.files import json_object, write_json
from align.run.manifest import read_manifest

SEED, CODE = "seed", "code"
COST = ("minutes", "peak_memory_mb", "tokens")
"""What a run took, as its record has it under `cost`."""
LOW = ("loss", "perplexity", *MOVED, *COST)
HIGH = ("win_rate", "accuracy", "held_out_score", "last_score", "score")
"""Beginnings of figures that are better low, and of those that are better high. Of others nobody says."""
SHARES = ("rate", "accuracy")
"""Ends of figures that lie between 0 and 1, and so do their intervals."""
FIGURES = 4
"""Further figures in a table for eyes."""


@dataclass(frozen=True, slots=True)
class Row:
    """Runs that are alike but for their seed.

    Attributes:
        records: theirs.
        settings: key → value, of the keys in which the rows differ.
        by_seed: seed → the figures of its first run.
        figures: name → number, or an interval: the run's own; over several seeds that of their mean.
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
    """Runs side by side.

    Attributes:
        keys: of the settings in which they differ; of runs of several stages, among those that all of them have.
        inputs: those of the keys that are inputs.
        scores: the figures that they are judged by.
        figures: the other ones that every row has and that tell rows apart, what weighs most first.
        apart: how many settings only some of the stages have.
    """

    rows: tuple[Row, ...]
    keys: tuple[str, ...]
    inputs: frozenset[str]
    scores: tuple[str, ...]
    figures: tuple[str, ...]
    apart: int

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(record["stage"] for row in self.rows for record in row.records))


def compare(root: Path, records: Sequence[Record], asked: Sequence[str] = ()) -> Comparison:
    """Compare runs, in the order in which they are given.

    Args:
        root: the folder of all runs.
        records: theirs, see `align.registry.record`.
        asked: keys of records that are compared in place of the usual figures.

    Raises:
        InputError: one of them cannot be read.
    """
    settings: list[dict[str, Any]] = []
    for record in records:
        if record["status"] == UNREADABLE:
            raise InputError(RUNS, record["run"], f"cannot be read: {record['error']}", "Leave it out.")
        manifest = read_manifest(root / record["folder"])
        # What decides what a run makes: settings, inputs by their digests, code.
        settings.append(finite(settings_of(manifest) | made_from(record) | {CODE: manifest.code[:8]}))
    every = list(dict.fromkeys(key for one in settings for key in one))
    common = every
    if len({record["stage"] for record in records}) > 1:
        # A learning rate of SFT says nothing of PPO's.
        shared = [key for key in every if key == "stage.name" or not key.startswith("stage.")]
        common = [key for key in shared if all(key in one for one in settings)]
    unlike = [key for key in common if any(one.get(key) != settings[0].get(key) for one in settings)]
    alike: dict[str, list[int]] = {}
    for i, (record, one) in enumerate(zip(records, settings, strict=True)):
        same = {key: value for key, value in one.items() if key != SEED}
        alone = "" if record["status"] == "done" else record["run"]
        alike.setdefault(json.dumps([same, alone], sort_keys=True, default=str), []).append(i)
    keys = [key for key in unlike if key not in (SEED, CODE)] + [key for key in (SEED, CODE) if key in unlike]
    # How far runs moved from their start: two measures are not to be compared, so one that all done runs have.
    done = [record["metrics"] for record in records if record["status"] == "done"]
    moved = next((one for one in MOVED if done and all(number(of.get(one)) is not None for of in done)), "")
    rows = []
    for group in alike.values():
        own = sorted((records[i] for i in group), key=lambda record: record["seed"])
        by_seed = {record["seed"]: figures_of(record, asked, moved) for record in once_a_seed(own)}
        own_settings = {key: settings[group[0]].get(key) for key in keys if key != SEED}
        rows.append(Row(tuple(own), own_settings, by_seed, figures_over([*by_seed.values()])))
    scores = tuple(asked)
    if not scores:
        main: list[str] = [record["score"]["name"] for record in records if record.get("score")]
        scores = tuple(dict.fromkeys([*main, moved] if moved else main))
    inputs = frozenset(key for record in records for key in made_from(record))
    return Comparison(tuple(rows), tuple(keys), inputs, scores, telling(rows, scores), len(every) - len(common))


def better_low(name: str) -> bool | None:
    """Return whether a figure is better low; None if nobody says."""
    name = name.removeprefix("metrics.").removeprefix("cost.").removesuffix(".value")
    low, high = (name.startswith(some) for some in (LOW, HIGH))
    return low if low != high else None


def once_a_seed(records: Sequence[Record]) -> list[Record]:
    """Return the first run of each seed: the same run once more says nothing of how far others would lie."""
    return list({record["seed"]: record for record in reversed(records)}.values())[::-1]


def figures_of(record: Record, asked: Sequence[str], moved: str) -> dict[str, Any]:
    """Return the figures of a run: numbers, and intervals."""
    cost = {name: record["cost"][name] for name in COST}
    if asked:
        found = {key: value_at(record, key) for key in asked} | {moved: record["metrics"].get(moved), **cost}
    else:
        found = {**dict(flattened(record["metrics"])), **cost}
        for name in ("peak_rss_mb", "peak_gpu_mb", "predicted_peak_mb"):  # which are costs
            found.pop(name, None)
    return {name: value for name, value in found.items() if number(value) is not None}


def figures_over(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of a row. Of several runs: the mean over those that have one, with its interval by Student's
    t; how many have it, if some do not."""
    if len(runs) == 1:
        return dict(runs[0])
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [value_of(run[name]) for run in runs if name in run]
        alike = len({*values}) == 1 and len(values) == len(runs)
        found[name] = values[0] if alike else mean_of(name, values)
        if len(values) < len(runs):
            found[name]["n"] = len(values)
    return found


def mean_of(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of several seeds with its interval, that of a share within 0 and 1."""
    from align.ops.intervals import mean  # it needs NumPy

    over = mean(values)
    low, high = over.low, over.high
    if name.removesuffix(".value").endswith(SHARES) and low is not None and high is not None:
        low, high = max(0.0, low), min(1.0, high)
    return {"value": over.value, "low": low, "high": high}


def value_of(figure: Any) -> float:
    """Return the number that a figure is, without its interval."""
    return figure["value"] if isinstance(figure, Mapping) else figure


def telling(rows: Sequence[Row], scores: Sequence[str]) -> tuple[str, ...]:
    """Return the figures besides the scores that every row has that has any, and that tell rows apart."""
    with_any = [row.figures for row in rows if row.figures]
    common = [name for name in (with_any[0] if with_any else ()) if all(name in one for one in with_any)]
    apart = [name for name in common if len({value_of(one[name]) for one in with_any}) > 1 and name not in scores]
    return (*(name for name in by_weight(apart) if name not in COST), *(name for name in COST if name in apart))


def shown_settings(compared: Comparison) -> list[dict[str, str]]:
    """Return each row's settings and seeds as text; an input without its digest if its name alone says which it is."""
    shown = [
        {key: cell(value) for key, value in row.settings.items()} | {SEED: ", ".join(map(str, row.seeds))}
        for row in compared.rows
    ]
    for key in compared.inputs.intersection(compared.keys):
        digests: dict[str, set[str]] = {}
        for row in shown:
            name, _, digest = row.get(key, "").rpartition(" (")
            digests.setdefault(name, set()).add(digest)
        if "" not in digests and all(len(one) == 1 for one in digests.values()):
            for row in shown:
                row[key] = row[key].rpartition(" (")[0]
    return shown


def as_lines(compared: Comparison, width: int | None = None) -> Iterator[str]:
    """Yield the table as text, and notes below it.

    Args:
        width: columns of the terminal: fewer further figures are shown where they do not fit; None for any.
    """
    count = min(FIGURES, len(compared.figures))
    lines = [*align_columns(table_cells(compared, count))]
    while count and width is not None and max(map(len, lines)) > width:
        count -= 1
        lines = [*align_columns(table_cells(compared, count))]
    yield from lines
    yield from notes(compared, len(compared.figures) - count)


def table_cells(compared: Comparison, count: int) -> list[list[str]]:
    """Return the table's cells: its head, and a line a row.

    Args:
        count: of the figures besides the scores.
    """
    unfinished = any(row.records[0]["status"] != "done" for row in compared.rows)
    figures = [*compared.scores, *compared.figures[:count]]
    lines = [["run", *(["status"] if unfinished else []), *compared.keys, *figures]]
    for row, settings in zip(compared.rows, shown_settings(compared), strict=True):
        more = f" +{len(row.runs) - 1}" if len(row.runs) > 1 else ""
        status = [clean(row.records[0]["status"])] if unfinished else []
        values = [*(clean(settings[key]) for key in compared.keys), *(cell(row.figures.get(name)) for name in figures)]
        lines.append([clean(row.runs[0]) + more, *status, *values])
    return lines


def altered_in_rows(found: Comparison) -> list[str]:
    """Return why figures of a comparison are not known to be the published ones; empty if all are."""
    problems = (altered_in(record) for row in found.rows for record in row.records)
    return list(dict.fromkeys(filter(None, problems)))


def notes(found: Comparison, more: int) -> Iterator[str]:
    """Yield notes to stand below the table.

    Args:
        more: figures that it does not show.
    """
    yield from (f"ALTERED: {one_line(problem)}" for problem in altered_in_rows(found))
    if len(found.rows) == 1 and len(found.rows[0].records) == 1:
        yield "one run alone"
    elif not found.keys:
        yield "no setting differs"
    if any(len(row.by_seed) > 1 for row in found.rows):
        yield "Of several seeds: the mean over them, with its 95 % interval by Student's t."
    if found.apart:
        yield f"{counted(found.apart, 'setting')} left out, which only some of these stages have"
    if more:
        yield f"{counted(more, 'figure')} more that differ: stage.format=json, or stage.html=FILE"


def as_objects(found: Comparison) -> dict[str, Any]:
    """Return the same as plain JSON, with all figures."""
    return {
        "keys": [key for key in found.keys if key != SEED],
        "scores": list(found.scores),
        "settings_of_some": found.apart,
        "altered": altered_in_rows(found),
        "rows": [
            {
                "runs": row.runs,
                "status": row.records[0]["status"],
                "seeds": row.seeds,
                "settings": finite(row.settings),
                "figures": finite(row.figures),
            }
            for row in found.rows
        ],
    }


def as_csv(found: Comparison) -> str:
    """Return the same as CSV: a line a row, an interval in columns of its own."""
    rows = []
    for row in as_objects(found)["rows"]:
        own = {"runs": " ".join(row["runs"]), "status": row["status"], "seeds": " ".join(map(str, row["seeds"]))}
        parted = {name: one if is_interval(one) else {"value": one} for name, one in row["figures"].items()}
        figures = {key.removesuffix(".value"): value for key, value in leaves(parted)}
        rows.append({**own, **row["settings"], **figures, **own})  # first, whatever figures are called
    return csv_of(list(dict.fromkeys(key for row in rows for key in row)), rows)


SWEEPS = "compare"
SCHEMA = 1
SWEEP = "stage.sweep"


def note_sweep(root: Path, name: str, runs: list[str]) -> None:
    """Keep which runs a sweep is.

    Args:
        runs: each as `stage:name`.
    """
    path = root / SWEEPS / f"{name}.json"
    refuse_foreign_file(path, "run.root", is_note)
    write_json(path, {"schema_version": SCHEMA, "runs": runs})


def is_note(data: bytes) -> bool:
    """Return whether the bytes are those of a note as `note_sweep` writes it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() == {"schema_version", "runs"}


def runs_of(root: Path, given: str) -> list[str]:
    """Return the runs of a sweep.

    Args:
        given: its name, or `latest`.

    Raises:
        MissingArtifact: there is no such sweep; the message has the nearest name.
        InputError: another version wrote its note.
        CorruptFile: its note names no runs.
    """
    noted = {path.stem: path for path in (root / SWEEPS).glob("*.json") if path.is_file()}
    newest = max(noted, key=lambda name: (noted[name].stat().st_mtime_ns, name), default=None)
    name = newest if given == "latest" else given
    if name is None or name not in noted:
        close = difflib.get_close_matches(given, noted, n=1)
        remedy = f"Did you mean {close[0]}? " if close else ""
        problem = f"is no sweep under {root}"
        raise MissingArtifact(SWEEP, given, problem, f"{remedy}A sweep (-m) of two runs that are done leaves one.")
    found = json_object(noted[name], SWEEP, "Name its runs by stage.runs.")
    require_schema_version(found.get("schema_version"), SCHEMA, SWEEP, str(noted[name]), "Name its runs by stage.runs.")
    runs = found.get("runs")
    if not isinstance(runs, list) or not all(isinstance(r, str) for r in runs):
        raise CorruptFile(SWEEP, given, f"{noted[name]} does not say which runs it is of", "Name them by stage.runs.")
    return runs
