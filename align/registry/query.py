"""Questions to the index: conditions on keys of records, and an order."""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from align.core.errors import InputError, require
from align.registry.index import Index
from align.registry.record import Record

COMPARED = re.compile(r"\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*", re.DOTALL)
WHERE, SORT, COLUMNS = "stage.where", "stage.sort", "stage.columns"
EXAMPLE = "Write \"stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}\"."
ALWAYS = ("started", "finished")
COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def find_runs(
    index: Index,
    where: Iterable[tuple[str, Any]],
    sort: Sequence[str],
    limit: int,
    columns: Sequence[str] = (),
    offset: int = 0,
) -> tuple[list[Record], int]:
    """Return the records that meet every condition, in order; and how many there are in all.

    Args:
        where: (key of a record, what it has to be), see `predicate_of`.
        sort: keys; one with `-` in front is sorted from high to low. Records without it come last.
        limit: how many at most, behind the first `offset` ones.
        columns: further keys that some run has to have.

    Raises:
        InputError: a condition cannot be read, or no run has such a key.
    """
    where = list(where)
    require(len(where) <= 20, WHERE, f"{len(where):,} conditions", "are more than 20", "Name fewer.")
    paths = [path_of(index, WHERE, key) for key, _ in where]
    predicates = [predicate_of(f"{WHERE}.{key}", wanted) for key, wanted in where]
    require(len(sort) <= 20, SORT, f"{len(sort):,} keys", "are more than 20", "Name fewer.")
    order: list[str] = []
    order_paths: list[str] = []
    for given in sort:
        path = path_of(index, SORT, given.removeprefix("-"))
        order += ["json_extract(record, ?) is null", f"json_extract(record, ?) {'desc' if given[0] == '-' else 'asc'}"]
        order_paths += [path, path]
    for key in columns:
        path_of(index, COLUMNS, key, whole=True)

    def is_met(pair: str, number: int) -> bool:
        return predicates[number](json.loads(pair)[0])

    index.db.create_function("is_met", 2, is_met)
    # Of two paths SQLite gives a JSON array, in which values keep their types.
    condition = " and ".join(f"is_met(json_extract(record, ?, '$'), {i})" for i in range(len(where))) or "1"
    records = index.selected(condition, ", ".join([*order, "run"]), [*paths, *order_paths], limit, offset)
    if len(records) < limit and (records or not offset):
        return records, offset + len(records)
    return records, index.count(condition, paths)


def predicate_of(field: str, wanted: Any) -> Callable[[Any], bool]:
    """Return the test of a value in a record. Of a list, one of its values has to meet the condition.

    Args:
        wanted: a value; a text with `*`; a text that begins with `>=`, `<=`, `>`, `<`, `!=` or `=`; or a list of these,
            of which one is to be met.
    """
    if isinstance(wanted, list | tuple):
        require(len(wanted) > 0, field, wanted, "is empty, and no run meets it", "Name the values.")
        most = 500
        require(
            len(wanted) <= most, field, f"{len(wanted):,} values", f"are more than {most}", "Ask for fewer at once."
        )
        parts = [predicate_of(field, one) for one in wanted]
        return lambda value: any(part(value) for part in parts)
    require(not isinstance(wanted, Mapping), field, wanted, "is no value", EXAMPLE)
    sign = "="
    operand = wanted
    if isinstance(wanted, str) and (compared := COMPARED.fullmatch(wanted)):
        sign = compared[1]
        operand = plain(compared[2])
        require(operand != "", field, wanted, "compares with nothing", EXAMPLE)
    if operand is None:
        require(sign in ("=", "!="), field, wanted, "compares with nothing", EXAMPLE)
        return lambda value: (value in (None, [])) == (sign == "=")  # an empty list is nothing too
    slip = sign in ("=", "<", ">") and isinstance(operand, str) and operand.startswith(("=", ">", "<"))
    require(not slip, field, wanted, "is no comparison", "Write one of >=, <=, >, <, !=, =.")
    orders = sign in COMPARISONS and isinstance(operand, bool)
    require(not orders, field, wanted, "compares what is in no order", "Write true or false alone.")
    require(not isinstance(operand, float) or math.isfinite(operand), field, wanted, "is no finite number", EXAMPLE)

    def meets(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return any(holds(one, sign, operand) for one in values) != (sign == "!=")

    return meets


def holds(value: Any, sign: str, operand: Any) -> bool:
    """Return whether one value of a record compares so; for `!=`, whether it is equal."""
    if sign not in COMPARISONS and isinstance(operand, str) and "*" in operand:
        pattern = operand.replace("[", "[[]").replace("?", "[?]")
        text = str(int(value)) if isinstance(value, bool) else str(value)
        return isinstance(value, str | int | float) and fnmatchcase(text, pattern)
    if isinstance(operand, bool) or isinstance(value, bool):
        return value is operand
    if sign in COMPARISONS:
        kinds = str if isinstance(operand, str) else int | float
        return isinstance(value, kinds) and COMPARISONS[sign](value, operand)
    if isinstance(operand, int | float):  # a run may be called 7
        return value in (operand, str(operand))
    return value == operand


def plain(text: str) -> Any:
    """Return the number, true, false or null that a text is; itself if it is none."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) or value is None else text


def path_of(index: Index, field: str, key: str, whole: bool = False) -> str:
    """Return where the value of a key lies in a record, as SQLite writes it.

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
