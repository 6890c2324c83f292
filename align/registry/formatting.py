"""Formatting of run records as tables, details, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from align.registry.record import Record, describe_alteration
from align.report.figure_text import align_columns, escape_unprintable, format_figure, is_interval

NOTHING = "–"
LONGEST = 60
"""Largest number of characters of a table cell."""
A_LINE = 400
"""Largest number of characters of a value in a run's details, where each value has its own line."""
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
"""Keys of a record that come first in a run's details and in CSV."""


def as_table(records: Sequence[Record], columns: Sequence[str], now: datetime) -> Iterator[str]:
    """Yield the lines of a text table of runs: the column names, and one line per record.

    Args:
        columns: names of usual columns and keys of records; empty for the usual columns that hold any value.
    """
    head = list(columns) or list(USUAL)
    cells = [
        [USUAL[key](record, now) if key in USUAL else format_cell(get_value(record, key)) for key in head]
        for record in records
    ]
    if not columns:
        indices = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", NOTHING) for row in cells)]
        head = [head[i] for i in indices]
        cells = [[row[i] for i in indices] for row in cells]
    yield from align_columns([head, *cells])


def format_age(record: Mapping[str, Any], now: datetime) -> str:
    """Return the time since a run started as text, such as `3 h`, `now`, or `–` if the start is unknown."""
    try:
        started = datetime.fromisoformat(record["started"])
    except (KeyError, TypeError, ValueError):
        return NOTHING
    seconds = (now - (started if started.tzinfo else started.replace(tzinfo=UTC))).total_seconds()
    if seconds < -60:
        return "in the future"  # a clock was set back, or that of another machine is ahead
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return "now"


def format_base(record: Mapping[str, Any]) -> str:
    base = record.get("base")
    return str(base["id"]) if base else NOTHING


def format_status(record: Mapping[str, Any]) -> str:
    """Return a run's status as text, followed by `stale` and `altered` if they apply."""
    marks = ("stale" if record.get("stale") else "", "altered" if describe_alteration(record) else "")
    return ", ".join([str(record["status"]), *filter(None, marks)])


def format_method(record: Mapping[str, Any]) -> str:
    method = record.get("method") or {}
    rank = f" r{method['r']}" if isinstance(method.get("r"), int) else ""
    return f"{method['name']}{rank}" if method.get("name") else NOTHING


def format_data(record: Mapping[str, Any]) -> str:
    """Return the name of a run's data, or the last part of a path, or `–` if the run has no data."""
    name = str((record.get("data") or {}).get("name") or NOTHING)
    return name.rstrip("/").rpartition("/")[2] or name


def format_score(record: Mapping[str, Any]) -> str:
    """Return a run's main metric as text, such as `win_rate 0.62`, with `collapsed` appended if the policy
    collapsed."""
    score = record.get("score")
    if not score:
        return NOTHING
    text = f"{score['name']} {format_value(score if is_interval(score) else score['value'])}"
    return f"{text}, collapsed" if get_value(record, "metrics.collapse.verdict") == "collapsed" else text


def format_kl(record: Mapping[str, Any]) -> str:
    kl = record.get("kl")
    return NOTHING if kl is None else format_value(kl)


def format_parents(record: Mapping[str, Any]) -> str:
    """Return the names of a run's parents as text, with `(gone)` after each one that no longer exists."""
    gone = record.get("gone", ())
    return ", ".join(f"{run} (gone)" if run in gone else run for run in record.get("parents", ())) or NOTHING


USUAL: Mapping[str, Callable[[Record, datetime], str]] = {
    "run": lambda record, now: clean_text(record["run"]),
    "alias": lambda record, now: clean_text(", ".join(f"@{alias}" for alias in record.get("aliases", ())) or NOTHING),
    "status": lambda record, now: clean_text(format_status(record)),
    "age": format_age,
    "base": lambda record, now: clean_text(format_base(record)),
    "method": lambda record, now: clean_text(format_method(record)),
    "data": lambda record, now: clean_text(format_data(record)),
    "score": lambda record, now: clean_text(format_score(record)),
    "KL": lambda record, now: format_kl(record),
    "from": lambda record, now: clean_text(format_parents(record)),
    "error": lambda record, now: escape_unprintable(record.get("error") or NOTHING),
}
"""Name of a column in the default table → function that formats its cell from a record and the present time."""


def as_json(records: Sequence[Record], columns: Sequence[str]) -> Iterator[str]:
    """Yield one text, a JSON array of records, reduced to the keys in `columns` unless that is empty."""
    yield json.dumps(
        [select_keys(record, columns) for record in records], indent=2, ensure_ascii=False, allow_nan=False
    )


def as_object(record: Record, columns: Sequence[str]) -> Iterator[str]:
    """Yield one text, a record as a JSON object, reduced to the keys in `columns` unless that is empty."""
    yield json.dumps(select_keys(record, columns), indent=2, ensure_ascii=False, allow_nan=False)


def select_keys(record: Record, columns: Sequence[str]) -> Record:
    return {key: get_value(record, key) for key in columns} if columns else record


def as_csv(records: Sequence[Record], columns: Sequence[str]) -> Iterator[str]:
    """Yield one text, a CSV table of records with the keys in `columns`, or with all keys if that is empty."""
    rows = [dict(iter_leaves(record)) for record in records]
    all_keys = dict.fromkeys([*FIRST, *sorted({key for row in rows for key in row})])
    keys_with_values = {key for row in rows for key, value in row.items() if value is not None}
    # A mapping in one record may be null in another.
    mappings = {key.rpartition(".")[0] for key in all_keys} - keys_with_values
    names = list(columns) or [key for key in all_keys if key not in mappings]
    if columns:
        rows = [{key: get_value(record, key) for key in columns} for record in records]
    yield to_csv(names, rows)


def to_csv(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a CSV table with a header line. A cell is empty if its row lacks the key."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([to_csv_value(row.get(key)) for key in names] for row in rows)
    return text.getvalue().removesuffix("\n")


def iter_details(record: Record) -> Iterator[str]:
    """Yield one line of text for each key of a record that has a value, the most important keys first."""
    values = {key: value for key, value in iter_leaves(record) if value not in (None, "", [])}
    order = [*(key for key in FIRST if key in values), *(key for key in values if key not in FIRST)]
    width = min(max(map(len, order)), 40)
    for key in order:
        yield f"{escape_unprintable(key).ljust(width)}  {format_cell(values[key], longest=A_LINE)}"


def iter_leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each innermost value of nested mappings."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from iter_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def get_value(record: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key in nested mappings, or None if the key is missing."""
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def format_cell(value: Any, longest: int | None = LONGEST) -> str:
    """Format a value of a record as one line of text, cut to `longest` characters, with `–` for None."""
    if value is None:
        return NOTHING
    is_nested = isinstance(value, list) and any(isinstance(element, list | Mapping) for element in value)
    if is_nested or (isinstance(value, Mapping) and not is_interval(value)):
        return clean_text(json.dumps(value, ensure_ascii=False), longest)
    return clean_text(format_value(value), longest)


def format_value(value: Any) -> str:
    """Format a metric, such as a number or an interval, as text, or any other value as JSON."""
    try:
        return format_figure(value)
    except (TypeError, ValueError, OverflowError, KeyError):
        return json.dumps(value, ensure_ascii=False)


def clean_text(text: str, longest: int | None = LONGEST) -> str:
    """Escape control characters in a text so that it is one safe line in a terminal, and cut it to `longest`
    characters."""
    line = escape_unprintable(text)
    return line if longest is None or len(line) <= longest else f"{line[: longest - 1]}…"


def to_csv_value(value: Any) -> Any:
    """Return a value as a CSV cell: None as empty, booleans in lower case, lists and mappings as JSON, others
    unchanged."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else value
