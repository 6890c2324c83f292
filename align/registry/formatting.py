"""Records as text: a table for eyes, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from align.registry.record import Record, altered_in
from align.report.figure_text import align_columns, format_figure, is_interval, one_line

NOTHING = "–"
LONGEST, A_LINE = 60, 400
"""Characters of a cell, and of a value that has a line to itself."""
FIRST = (
    "run",
    "aliases",
    "status",
    "error",
    "stale",
    "altered",
    "replaced",
    "score.name",
    "score.value",
    "score.low",
    "score.high",
    "kl",
    "parents",
    "gone",
    "children",
    "exports",
    "evaluation",
    "started",
    "finished",
    "base.id",
    "method.name",
    "method.r",
    "data.name",
    "data.rows",
    "reward",
    "seed",
    "cost.minutes",
    "cost.peak_memory_mb",
    "cost.tokens",
    "cost.device",
)
"""The keys that come first where a run is shown, or all are listed; the others follow."""


def as_table(records: Sequence[Record], columns: Sequence[str], now: datetime) -> Iterator[str]:
    """One line a record below the names of the columns.

    Args:
        columns: names of usual columns and keys of records; none for the usual columns that hold anything.
    """
    head = list(columns) or list(USUAL)
    cells = [
        [USUAL[key](record, now) if key in USUAL else cell(value_at(record, key)) for key in head] for record in records
    ]
    if not columns:
        kept = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", NOTHING) for row in cells)]
        head, cells = [head[i] for i in kept], [[row[i] for i in kept] for row in cells]
    yield from align_columns([head, *cells])


def age(record: Mapping[str, Any], now: datetime) -> str:
    """How long ago a run began."""
    try:
        began = datetime.fromisoformat(record["started"])
    except (KeyError, TypeError, ValueError):
        return NOTHING
    seconds = (now - (began if began.tzinfo else began.replace(tzinfo=UTC))).total_seconds()
    if seconds < -60:
        return "in the future"  # a clock was set back, or another machine's is ahead
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return "now"


def base_of(record: Mapping[str, Any]) -> str:
    base = record.get("base")
    return str(base["id"]) if base else NOTHING


def status_in(record: Mapping[str, Any]) -> str:
    """Return a run's status, with `stale` and `altered` behind it where they apply."""
    marks = ("stale" if record.get("stale") else "", "altered" if altered_in(record) else "")
    return ", ".join([str(record["status"]), *filter(None, marks)])


def method_in(record: Mapping[str, Any]) -> str:
    method = record.get("method") or {}
    rank = f" r{method['r']}" if isinstance(method.get("r"), int) else ""
    return f"{method['name']}{rank}" if method.get("name") else NOTHING


def data_in(record: Mapping[str, Any]) -> str:
    """The name of its data, of a path the last part."""
    name = str((record.get("data") or {}).get("name") or NOTHING)
    return name.rstrip("/").rpartition("/")[2] or name


def score_in(record: Mapping[str, Any]) -> str:
    """Return the name and value of the main figure, and that the policy collapsed if its evaluation says so."""
    score = record.get("score")
    if not score:
        return NOTHING
    shown = f"{score['name']} {figure(score if is_interval(score) else score['value'])}"
    return f"{shown}, collapsed" if value_at(record, "metrics.collapse.verdict") == "collapsed" else shown


def kl_in(record: Mapping[str, Any]) -> str:
    kl = record.get("kl")
    return NOTHING if kl is None else figure(kl)


def parents_in(record: Mapping[str, Any]) -> str:
    """The runs that it was made from; of one that is not there any more, that it is gone."""
    gone = record.get("gone", ())
    return ", ".join(f"{run} (gone)" if run in gone else run for run in record.get("parents", ())) or NOTHING


USUAL: Mapping[str, Callable[[Record, datetime], str]] = {
    "run": lambda record, now: clean(record["run"]),
    "alias": lambda record, now: clean(", ".join(f"@{alias}" for alias in record.get("aliases", ())) or NOTHING),
    "status": lambda record, now: clean(status_in(record)),
    "age": age,
    "base": lambda record, now: clean(base_of(record)),
    "method": lambda record, now: clean(method_in(record)),
    "data": lambda record, now: clean(data_in(record)),
    "score": lambda record, now: clean(score_in(record)),
    "KL": lambda record, now: kl_in(record),
    "from": lambda record, now: clean(parents_in(record)),
    "error": lambda record, now: one_line(record.get("error") or NOTHING),
}
"""Column of the usual table → its cell."""


def as_json(records: Sequence[Record], columns: Sequence[str]) -> Iterator[str]:
    """One array, an object a record; with columns, those keys alone."""
    yield json.dumps([chosen(one, columns) for one in records], indent=2, ensure_ascii=False, allow_nan=False)


def as_object(record: Record, columns: Sequence[str]) -> Iterator[str]:
    """One object; with columns, those keys alone."""
    yield json.dumps(chosen(record, columns), indent=2, ensure_ascii=False, allow_nan=False)


def chosen(record: Record, columns: Sequence[str]) -> Record:
    return {key: value_at(record, key) for key in columns} if columns else record


def as_csv(records: Sequence[Record], columns: Sequence[str]) -> Iterator[str]:
    """A head and one line a record; without columns, every key that any record has."""
    rows = [dict(leaves(record)) for record in records]
    every = dict.fromkeys([*FIRST, *sorted({key for row in rows for key in row})])
    full = {key for row in rows for key, value in row.items() if value is not None}
    inner = {key.rpartition(".")[0] for key in every} - full  # what is a mapping in one record is null in another
    names = list(columns) or [key for key in every if key not in inner]
    if columns:
        rows = [{key: value_at(record, key) for key in columns} for record in records]
    yield csv_of(names, rows)


def csv_of(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A head and a line a row; a cell is empty where a row does not have it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([plain(row.get(key)) for key in names] for row in rows)
    return text.getvalue().removesuffix("\n")


def details(record: Record) -> Iterator[str]:
    """Everything that is known of one run, a line a key that has a value, the most important first."""
    found = {key: value for key, value in leaves(record) if value not in (None, "", [])}
    order = [*(key for key in FIRST if key in found), *(key for key in found if key not in FIRST)]
    width = min(max(map(len, order)), 40)
    for key in order:
        yield f"{one_line(key).ljust(width)}  {cell(found[key], longest=A_LINE)}"


def leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key → value, of nested mappings."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_at(record: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    inside: Any = record
    for part in key.split("."):
        inside = inside.get(part) if isinstance(inside, Mapping) else None
    return inside


def cell(value: Any, longest: int | None = LONGEST) -> str:
    """A value for eyes, on one line."""
    if value is None:
        return NOTHING
    nested = isinstance(value, list) and any(isinstance(one, list | Mapping) for one in value)
    if nested or (isinstance(value, Mapping) and not is_interval(value)):
        return clean(json.dumps(value, ensure_ascii=False), longest)
    return clean(figure(value), longest)


def figure(value: Any) -> str:
    """A figure for eyes; one of an odd shape as it stands."""
    try:
        return format_figure(value)
    except (TypeError, ValueError, OverflowError, KeyError):
        return json.dumps(value, ensure_ascii=False)


def clean(text: str, longest: int | None = LONGEST) -> str:
    """Text from a file on one line: what would move a terminal's cursor is written out."""
    shown = one_line(text)
    return shown if longest is None or len(shown) <= longest else f"{shown[: longest - 1]}…"


def plain(value: Any) -> Any:
    """A value in a cell of CSV: nothing for null, JSON for a list."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else value
