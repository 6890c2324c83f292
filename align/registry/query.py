"""What is asked of the index, in SQLite's words: conditions on keys of records, and an order."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.core.errors import InputError, require
from align.registry.index import Index
from align.registry.record import Record

COMPARED = re.compile(r"\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*", re.DOTALL)
WHERE, SORT, COLUMNS = "stage.where", "stage.sort", "stage.columns"
EXAMPLE = "Write \"stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}\"."
ALWAYS = ("started", "finished")
LARGEST = 2**63 - 1
"""Of SQLite's whole numbers."""
Part = tuple[str, list[Any]]
"""Of a query: SQL, and the values in it."""


def found(
    index: Index,
    where: Iterable[tuple[str, Any]],
    sort: Sequence[str],
    limit: int,
    columns: Sequence[str] = (),
    offset: int = 0,
) -> tuple[list[Record], int]:
    """The records that meet every condition, in order; and how many there are in all.

    Args:
        where: (key of a record, what it has to be), see `condition`.
        sort: keys; one with `-` in front is sorted from high to low. Records without it come last.
        limit: how many at most, behind the first `offset` ones.
        columns: further keys that some run has to have.

    Raises:
        InputError: a condition cannot be read, or no run has such a key.
    """
    where = list(where)
    require(len(where) <= 20, WHERE, f"{len(where):,} conditions", "are more than 20", "Name fewer.")
    parts: list[Part] = [("1", [])]
    for key, wanted in where:
        parts.append(condition(path_of(index, WHERE, key), f"{WHERE}.{key}", wanted))
    require(len(sort) <= 20, SORT, f"{len(sort):,} keys", "are more than 20", "Name fewer.")
    order: list[Part] = []
    for given in sort:
        path = path_of(index, SORT, given.removeprefix("-"))
        falls = "desc" if given.startswith("-") else "asc"
        order += [("json_extract(record, ?) is null", [path]), (f"json_extract(record, ?) {falls}", [path])]
    for key in columns:
        path_of(index, COLUMNS, key, whole=True)
    values = [value for _, some in (*parts, *order) for value in some]
    ordered = ", ".join([*(sql for sql, _ in order), "run"])
    met = " and ".join(sql for sql, _ in parts)
    records = index.selected(met, ordered, values, limit, offset)
    if len(records) < limit and (records or not offset):
        return records, offset + len(records)
    return records, index.count(met, [value for _, some in parts for value in some])


def condition(path: str, field: str, wanted: Any) -> Part:
    """One condition.

    Args:
        path: of the value in a record, as SQLite writes it. Of a list, one of its values has to meet the condition.
        wanted: a value; a text with `*`; a text that begins with `>=`, `<=`, `>`, `<`, `!=` or `=`; or a list of these,
            of which one is to be met.
    """
    if isinstance(wanted, list | tuple):
        require(len(wanted) > 0, field, wanted, "is empty, and no run meets it", "Name the values.")
        most, remedy = 500, "Ask for fewer at once."
        require(len(wanted) <= most, field, f"{len(wanted):,} values", f"are more than {most}", remedy)
        parts = [condition(path, field, one) for one in wanted]
        return f"({' or '.join(sql for sql, _ in parts)})", [value for _, some in parts for value in some]
    require(not isinstance(wanted, Mapping), field, wanted, "is no value", EXAMPLE)
    sign, value = "=", wanted
    if isinstance(wanted, str) and (compared := COMPARED.fullmatch(wanted)):
        sign, value = compared[1], plain(compared[2])
        require(value != "", field, wanted, "compares with nothing", EXAMPLE)
    if value is None:
        require(sign in ("=", "!="), field, wanted, "compares with nothing", EXAMPLE)
        nothing = "ifnull(json_extract(record, ?), '[]') = '[]'"  # an empty list is nothing too
        return nothing if sign == "=" else f"not {nothing}", [path]
    slip = sign in ("=", "<", ">") and isinstance(value, str) and value.startswith(("=", ">", "<"))
    require(not slip, field, wanted, "is no comparison", "Write one of >=, <=, >, <, !=, =.")
    orders = sign not in ("=", "!=") and isinstance(value, bool)
    require(not orders, field, wanted, "compares what is in no order", "Write true or false alone.")
    require(not isinstance(value, float) or math.isfinite(value), field, wanted, "is no finite number", EXAMPLE)
    if isinstance(value, int) and abs(value) > LARGEST:
        value = float(value)
    test, values = tested(sign, value)
    met = "select 1 from {} where " + test
    scalar = met.format("(select json_extract(record, ?) as value, json_type(record, ?) as type)")  # parsed once
    there = f"case json_type(record, ?) when 'array' then exists ({met.format('json_each(record, ?)')}) else exists "
    return f"{'not ' * (sign == '!=')}({there}({scalar}) end)", [path, path, *values, path, path, *values]


def tested(sign: str, value: Any) -> Part:
    """What one value of a record is to be; for `!=`, what it is not to be."""
    if sign not in ("=", "!="):
        kinds = "('integer', 'real')" if isinstance(value, int | float) else "('text')"
        return f"type in {kinds} and value {sign} ?", [value]  # SQLite would call every text greater than a number
    if isinstance(value, str) and "*" in value:
        return "value glob ?", [value.replace("[", "[[]").replace("?", "[?]")]
    if isinstance(value, bool):
        return "type = ?", [str(value).lower()]
    if isinstance(value, int | float):  # a run may be called 7
        return "value in (?, ?) and type not in ('true', 'false')", [value, str(value)]
    return "value = ?", [value]


def plain(text: str) -> Any:
    """The number, true, false or null that a text is; itself where it is none."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) or value is None else text


def path_of(index: Index, field: str, key: str, whole: bool = False) -> str:
    """Where the value of a key lies in a record, as SQLite writes it.

    Args:
        whole: the key may hold several keys.

    Raises:
        InputError: runs are there, and none has such a key.
    """
    simple = "$" + "".join(f'."{part}"' for part in str(key).split("."))
    require(isinstance(key, str) and bool(key) and '"' not in key, field, key, "is no key of a run", EXAMPLE)
    kind = index.kind(simple)
    every = key in ALWAYS  # whatever a folder says, or does not
    if every or (kind is not None and (whole or kind != "object")) or not index.names():
        return simple
    known = index.keys()  # the names of some keys have dots
    if inside := [one for one in known if one.startswith(f"{key}.")]:
        raise InputError(field, key, "holds several keys", f"Write one of: {', '.join(inside[:12])}.")
    if key in known:
        return known[key]
    close = difflib.get_close_matches(key, known, n=1) or [one for one in known if one.endswith(f".{key}")][:1]
    meant = f"Did you mean {close[0]}? " if close else ""
    remedy = f"{meant}`stage.action=show stage.run=STAGE:NAME stage.format=json` shows every key of a run."
    raise InputError(field, key, "is a key that no run here has", remedy)
