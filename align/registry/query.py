"""Queries on the index of runs: conditions on keys of their records, a sort order and a limit."""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from align.core.errors import InputError, require
from align.registry.index import Index
from align.registry.record import Record

COMPARED = re.compile(r"\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*", re.DOTALL)
WHERE = "stage.where"
SORT = "stage.sort"
COLUMNS = "stage.columns"
EXAMPLE = "Write \"stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}\"."
ALWAYS = ("started", "finished")
COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


class QueryResult(NamedTuple):
    """The records of the runs that a query returned, and the number of all matching runs.

    Attributes:
        records: records of the runs, in order, up to the limit.
        total: number of runs that meet the conditions, also beyond the limit.
    """

    records: list[Record]
    total: int


def find_runs(
    index: Index,
    where: Iterable[tuple[str, Any]],
    sort: Sequence[str],
    limit: int,
    columns: Sequence[str] = (),
    offset: int = 0,
) -> QueryResult:
    """Return the records of the runs that meet all conditions, sorted and limited, with the number of all matches.

    Args:
        where: pairs (key of a record, condition), see `make_predicate`.
        sort: keys; a leading `-` sorts from high to low. Records without the key come last.
        limit: largest number of records, after the first `offset` ones.
        columns: further keys; each must exist in some run.

    Raises:
        InputError: A condition is invalid, or no run has such a key.
    """
    where = list(where)
    require(len(where) <= 20, WHERE, f"{len(where):,} conditions", "are more than 20", "Name fewer.")
    paths = [find_path(index, WHERE, key) for key, _ in where]
    predicates = [make_predicate(f"{WHERE}.{key}", condition_value) for key, condition_value in where]
    require(len(sort) <= 20, SORT, f"{len(sort):,} keys", "are more than 20", "Name fewer.")
    order: list[str] = []
    order_paths: list[str] = []
    for sort_key in sort:
        path = find_path(index, SORT, sort_key.removeprefix("-"))
        order += [
            "json_extract(record, ?) is null",
            f"json_extract(record, ?) {'desc' if sort_key[0] == '-' else 'asc'}",
        ]
        order_paths += [path, path]
    for key in columns:
        find_path(index, COLUMNS, key, allow_object=True)

    def is_met(pair: str, number: int) -> bool:
        return predicates[number](json.loads(pair)[0])

    index.db.create_function("is_met", 2, is_met)
    # For two paths SQLite returns a JSON array, in which values keep their types.
    conditions = " and ".join(f"is_met(json_extract(record, ?, '$'), {i})" for i in range(len(where))) or "1"
    records = index.select_records(conditions, ", ".join([*order, "run"]), [*paths, *order_paths], limit, offset)
    if len(records) < limit and (records or not offset):
        return QueryResult(records, offset + len(records))
    return QueryResult(records, index.count_runs(conditions, paths))


def make_predicate(field: str, condition: Any) -> Callable[[Any], bool]:
    """Return a function that checks a value of a record against a condition, such as `>=0.7`, `ppo*` or a list of them.

    If the value is a list, one of its elements has to meet the condition.

    Args:
        field: name of the condition in error messages.
        condition: a value; a text with `*`; a text that begins with `>=`, `<=`, `>`, `<`, `!=` or `=`; or a list of
            such conditions; one of them has to be met.
    """
    if isinstance(condition, list | tuple):
        require(len(condition) > 0, field, condition, "is empty, so no run can match it", "Give one or more values.")
        limit = 500
        require(
            len(condition) <= limit,
            field,
            f"{len(condition):,} values",
            f"are more than {limit}",
            "Ask for fewer at once.",
        )
        alternatives = [make_predicate(field, alternative) for alternative in condition]
        return lambda value: any(is_met(value) for is_met in alternatives)
    require(not isinstance(condition, Mapping), field, condition, "is no value", EXAMPLE)
    sign = "="
    operand = condition
    if isinstance(condition, str) and (match := COMPARED.fullmatch(condition)):
        sign = match[1]
        operand = parse_scalar(match[2])
        require(operand != "", field, condition, "has no value to compare with", EXAMPLE)
    if operand is None:
        require(sign in ("=", "!="), field, condition, "has no value to compare with", EXAMPLE)
        return lambda value: (value in (None, [])) == (sign == "=")  # an empty list counts as null
    is_mistyped = sign in ("=", "<", ">") and isinstance(operand, str) and operand.startswith(("=", ">", "<"))
    require(not is_mistyped, field, condition, "is no comparison", "Write one of >=, <=, >, <, !=, =.")
    orders_booleans = sign in COMPARISONS and isinstance(operand, bool)
    require(not orders_booleans, field, condition, "compares values that have no order", "Write true or false alone.")
    require(not isinstance(operand, float) or math.isfinite(operand), field, condition, "is no finite number", EXAMPLE)

    def is_met(value: Any) -> bool:
        values = value if isinstance(value, list) else [value]
        return any(is_match(element, sign, operand) for element in values) != (sign == "!=")

    return is_met


def is_match(value: Any, sign: str, operand: Any) -> bool:
    """Return whether one value of a record equals `operand`, matches its `*` pattern, or is ordered as `sign` demands.

    For `!=`, return whether the two are equal; the caller negates it.
    """
    if sign not in COMPARISONS and isinstance(operand, str) and "*" in operand:
        pattern = operand.replace("[", "[[]").replace("?", "[?]")
        text = str(int(value)) if isinstance(value, bool) else str(value)
        return isinstance(value, str | int | float) and fnmatchcase(text, pattern)
    if isinstance(operand, bool) or isinstance(value, bool):
        return value is operand
    if sign in COMPARISONS:
        kinds = str if isinstance(operand, str) else int | float
        return isinstance(value, kinds) and COMPARISONS[sign](value, operand)
    if isinstance(operand, int | float):  # a run's name may be 7
        return value in (operand, str(operand))
    return value == operand


def parse_scalar(text: str) -> Any:
    """Parse a text to a number, a boolean or None, or return the text itself if it is none of these."""
    try:
        value = json.loads(text, parse_constant=str)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) or value is None else text


def find_path(index: Index, field: str, key: str, allow_object: bool = False) -> str:
    """Return the SQLite JSON path of a record's key, such as `$."cost"."minutes"`, or raise InputError if no run has
    it.

    Args:
        allow_object: the key may hold several keys.

    Raises:
        InputError: There are runs, and none has this key.
    """
    simple = "$" + "".join(f'."{part}"' for part in str(key).split("."))
    require(isinstance(key, str) and bool(key) and '"' not in key, field, key, "is no key of a run", EXAMPLE)
    kind = index.get_json_type(simple)
    exists = key in ALWAYS or (kind is not None and (allow_object or kind != "object"))
    if exists or not index.names():
        return simple
    paths = index.list_key_paths()  # some parts of keys contain dots
    if inner_keys := [name for name in paths if name.startswith(f"{key}.")]:
        raise InputError(field, key, "holds several keys", f"Write one of: {', '.join(inner_keys[:12])}.")
    if key in paths:
        return paths[key]
    similar = difflib.get_close_matches(key, paths, n=1) or [name for name in paths if name.endswith(f".{key}")]
    hint = f"Did you mean {similar[0]}? " if similar else ""
    remedy = f"{hint}`stage.action=show stage.run=STAGE:NAME stage.format=json` shows every key of a run."
    raise InputError(field, key, "is a key that no run here has", remedy)
