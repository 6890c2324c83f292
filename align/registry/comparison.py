"""Runs side by side: the settings in which they differ, and what came of them. Runs that differ in their seed alone
are one row, with the mean over them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import InputError
from align.registry.differences import RUNS, made_from, settings_of
from align.registry.record import MOVED, UNREADABLE, Record, altered_in, finite, number
from align.registry.shown import cell, clean, csv_of, in_columns, leaves, value_at
from align.report.figures import by_weight
from align.report.words import counted, flattened, is_interval
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


def comparison(root: Path, records: Sequence[Record], asked: Sequence[str] = ()) -> Comparison:
    """Compare runs, in the order in which they are given.

    Args:
        root: the folder of all runs.
        records: theirs, see `align.registry.record`.
        asked: keys of records that are compared in place of the usual figures.

    Raises:
        InputError: one of them cannot be read.
    """
    for record in records:
        if record["status"] == UNREADABLE:
            raise InputError(RUNS, record["run"], f"cannot be read: {record['error']}", "Leave it out.")
    settings = [finite(settings_in(root, record)) for record in records]
    every = list(dict.fromkeys(key for one in settings for key in one))
    several = len({record["stage"] for record in records}) > 1
    common = [key for key in every if not several or (shared(key) and all(key in one for one in settings))]
    unlike = [key for key in common if any(one.get(key) != settings[0].get(key) for one in settings)]
    alike: dict[str, list[int]] = {}
    for i, (record, one) in enumerate(zip(records, settings, strict=True)):
        same = {key: value for key, value in one.items() if key != SEED}
        alone = "" if record["status"] == "done" else record["run"]
        alike.setdefault(json.dumps([same, alone], sort_keys=True, default=str), []).append(i)
    keys = [key for key in unlike if key not in (SEED, CODE)] + [key for key in (SEED, CODE) if key in unlike]
    for group in alike.values():
        group.sort(key=lambda i: records[i]["seed"])
    moved = moved_by(records)
    telling_keys = [key for key in keys if key != SEED]
    rows = tuple(
        row_of([records[i] for i in group], {key: settings[group[0]].get(key) for key in telling_keys}, asked, moved)
        for group in alike.values()
    )
    main = dict.fromkeys(score for record in records for score in scores_of(record, moved))
    scores = tuple(asked) or tuple(main)
    inputs = frozenset(key for record in records for key in made_from(record))
    return Comparison(rows, tuple(keys), inputs, scores, telling(rows, scores), len(every) - len(common))


def row_of(records: Sequence[Record], settings: Mapping[str, Any], asked: Sequence[str], moved: str) -> Row:
    by_seed = {record["seed"]: figures_of(record, asked, moved) for record in once_a_seed(records)}
    return Row(tuple(records), settings, by_seed, figures_over([*by_seed.values()]))


def moved_by(records: Sequence[Record]) -> str:
    """The measure of how far runs moved from their start that all have which are done; empty where they have no common
    one: two measures are not to be compared."""
    done = [record["metrics"] for record in records if record["status"] == "done"]
    return next((one for one in MOVED if done and all(number(of.get(one)) is not None for of in done)), "")


def better_low(name: str) -> bool | None:
    """Whether a figure is better low; None where nobody says."""
    name = name.removeprefix("metrics.").removeprefix("cost.").removesuffix(".value")
    low, high = (name.startswith(some) for some in (LOW, HIGH))
    return low if low != high else None


def once_a_seed(records: Sequence[Record]) -> list[Record]:
    """The first run of each seed: the same run once more says nothing of how far others would lie."""
    return list({record["seed"]: record for record in reversed(records)}.values())[::-1]


def shared(key: str) -> bool:
    """Whether a setting means the same in every stage: a learning rate of SFT says nothing of PPO's."""
    return key == "stage.name" or not key.startswith("stage.")


def settings_in(root: Path, record: Record) -> dict[str, Any]:
    """Key → value of whatever decides what a run makes: settings, inputs by their digests, code."""
    manifest = read_manifest(root / record["folder"])
    return settings_of(manifest) | made_from(record) | {CODE: manifest.code[:8]}


def scores_of(record: Record, moved: str) -> list[str]:
    """The main figure of a run, and how far it moved."""
    score = record.get("score")
    return list(dict.fromkeys([*([score["name"]] if score else []), *([moved] if moved else [])]))


def figures_of(record: Record, asked: Sequence[str], moved: str) -> dict[str, Any]:
    """Name → figure of a run: numbers, and intervals."""
    cost = {name: record["cost"][name] for name in COST}
    if asked:
        found = {key: value_at(record, key) for key in asked} | {moved: record["metrics"].get(moved), **cost}
    else:
        found = {**dict(flattened(record["metrics"])), **cost}
        for name in ("peak_rss_mb", "peak_gpu_mb", "predicted_peak_mb"):  # which are costs
            found.pop(name, None)
    return {name: value for name, value in found.items() if number(value) is not None}


def figures_over(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of a row. Of several runs: the mean over those that have one, with its interval by Student's t; how
    many have it, where some do not."""
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
    """The mean of several seeds with its interval, that of a share within 0 and 1."""
    from align.ops.intervals import mean  # it needs NumPy

    over = mean(values)
    low, high = over.low, over.high
    if name.removesuffix(".value").endswith(SHARES) and low is not None and high is not None:
        low, high = max(0.0, low), min(1.0, high)
    return {"value": over.value, "low": low, "high": high}


def value_of(figure: Any) -> float:
    """The number that a figure is, without its interval."""
    return figure["value"] if isinstance(figure, Mapping) else figure


def telling(rows: Sequence[Row], scores: Sequence[str]) -> tuple[str, ...]:
    """The figures besides the scores that every row has that has any, and that tell rows apart."""
    with_any = [row.figures for row in rows if row.figures]
    common = [name for name in (with_any[0] if with_any else ()) if all(name in one for one in with_any)]
    apart = [name for name in common if len({value_of(one[name]) for one in with_any}) > 1 and name not in scores]
    return (*(name for name in by_weight(apart) if name not in COST), *(name for name in COST if name in apart))


def shown_settings(found: Comparison) -> list[dict[str, str]]:
    """Each row's settings for eyes; an input without its digest, where its name alone says which it is."""
    shown = [{key: cell(value) for key, value in row.settings.items()} for row in found.rows]
    for key in found.inputs.intersection(found.keys):
        digests: dict[str, set[str]] = {}
        for row in shown:
            name, _, digest = row.get(key, "").rpartition(" (")
            digests.setdefault(name, set()).add(digest)
        if "" not in digests and all(len(one) == 1 for one in digests.values()):
            for row in shown:
                row[key] = row[key].rpartition(" (")[0]
    return shown


def as_lines(found: Comparison, width: int | None = None) -> Iterator[str]:
    """A table for eyes.

    Args:
        width: columns of the terminal: fewer further figures are shown where they do not fit; None for any.
    """
    count = min(FIGURES, len(found.figures))
    while count and width is not None and widest(found, count) > width:
        count -= 1
    yield from in_columns(cells_of(found, found.figures[:count]))
    yield from notes(found, len(found.figures) - count)


def widest(found: Comparison, count: int) -> int:
    """Columns of the table with so many further figures."""
    return max(map(len, in_columns(cells_of(found, found.figures[:count]))))


def cells_of(found: Comparison, further: Sequence[str]) -> list[list[str]]:
    """The table's cells: its head, and a line a row."""
    unfinished = any(row.records[0]["status"] != "done" for row in found.rows)
    figures = [*found.scores, *further]
    lines = [["run", *(["status"] if unfinished else []), *found.keys, *figures]]
    for row, settings in zip(found.rows, shown_settings(found), strict=True):
        more, known = len(row.runs) - 1, settings | {SEED: ", ".join(map(str, row.seeds))}
        status = [clean(row.records[0]["status"])] if unfinished else []
        cells = [*(clean(known[key]) for key in found.keys), *(cell(row.figures.get(name)) for name in figures)]
        lines.append([clean(row.runs[0]) + (f" +{more}" if more else ""), *status, *cells])
    return lines


def altered_in_rows(found: Comparison) -> list[str]:
    """Return why figures of a comparison are not known to be the published ones; empty if all are."""
    problems = (altered_in(record) for row in found.rows for record in row.records)
    return list(dict.fromkeys(filter(None, problems)))


def notes(found: Comparison, more: int) -> Iterator[str]:
    """What is to be said below the table.

    Args:
        more: figures that it does not show.
    """
    yield from (f"ALTERED: {clean(problem, longest=None)}" for problem in altered_in_rows(found))
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
    """The same as plain JSON, with all figures."""
    rows = [
        {"runs": row.runs, "status": row.records[0]["status"], "seeds": row.seeds, "settings": finite(row.settings),
         "figures": finite(row.figures)}
        for row in found.rows
    ]  # fmt: skip
    keys = [key for key in found.keys if key != SEED]
    return {
        "keys": keys, "scores": list(found.scores), "settings_of_some": found.apart, "altered": altered_in_rows(found),
        "rows": rows,
    }  # fmt: skip


def as_csv(found: Comparison) -> str:
    """The same as CSV: a line a row, an interval in columns of its own."""
    rows = []
    for row in as_objects(found)["rows"]:
        own = {"runs": " ".join(row["runs"]), "status": row["status"], "seeds": " ".join(map(str, row["seeds"]))}
        parted = {name: one if is_interval(one) else {"value": one} for name, one in row["figures"].items()}
        figures = {key.removesuffix(".value"): value for key, value in leaves(parted)}
        rows.append({**own, **row["settings"], **figures, **own})  # first, whatever figures are called
    return csv_of(list(dict.fromkeys(key for row in rows for key in row)), rows)
