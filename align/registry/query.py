"""What is asked of the index, in SQLite's words: conditions on keys of records, and an order."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.errors import InputError, require
from align.registry.index import Index
from align.registry.record import Record

KEY = re.compile(r"[^\s\"]+")
COMPARED = re.compile(r"\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*", re.DOTALL)
WHERE, SORT, COLUMNS = "stage.where", "stage.sort", "stage.columns"
EXAMPLE = "Write \"stage.where={stage: ppo, metrics.win_rate.low: '>=0.7'}\"."


def found(
    index: Index, where: Mapping[str, Any], sort: Sequence[str], limit: int, columns: Sequence[str] = ()
) -> list[Record]:
    """The records that meet every condition, in order.

    Args:
        where: key of a record → what it has to be: a value; a list of values, of which it is one; a text with `*`; or a
            text that begins with `>=`, `<=`, `>`, `<`, `!=` or `=` and a value.
        sort: keys; one with `-` in front is sorted from high to low. Records without it come last.
        limit: how many at most.
        columns: further keys that some run has to have.

    Raises:
        InputError: a condition cannot be read, or no run has such a key.
    """
    parts, values = ["1"], list[Any]()
    for key, wanted in where.items():
        part, more = condition(key, wanted)
        parts.append(part)
        values += more
    order = []
    for given in sort:
        key, falls = given.removeprefix("-"), given.startswith("-")
        order.append(f"{place(key, SORT)} is null, {place(key, SORT)} {'desc' if falls else 'asc'}")
    check_keys(index, WHERE, where)
    check_keys(index, SORT, [given.removeprefix("-") for given in sort])
    check_keys(index, COLUMNS, columns, whole=True)
    return index.selected(" and ".join(parts), values, ", ".join([*order, "run"]), limit)


def place(key: str, field: str) -> str:
    """The value of a key in a record, in SQL."""
    require(KEY.fullmatch(key) is not None and "'" not in key, field, key, "is no key of a run", EXAMPLE)
    return f"json_extract(record, '{path(key)}')"


def path(key: str) -> str:
    return "$" + "".join(f'."{part}"' for part in key.split("."))


def condition(key: str, wanted: Any) -> tuple[str, list[Any]]:
    """One condition in SQL, and the values in it."""
    at, field = place(key, WHERE), f"{WHERE}.{key}"
    if isinstance(wanted, list | tuple):
        require(len(wanted) > 0, field, wanted, "is empty, and no run meets it", "Name the values.")
        parts, values = zip(*(condition(key, one) for one in wanted), strict=True)
        return f"({' or '.join(parts)})", [value for some in values for value in some]
    require(not isinstance(wanted, Mapping), field, wanted, "is no value", EXAMPLE)
    if wanted is None:
        return f"{at} is null", []
    if isinstance(wanted, str) and (compared := COMPARED.fullmatch(wanted)):
        sign, value = compared[1], plain(compared[2])
        require(value != "", field, wanted, "compares with nothing", EXAMPLE)
        if value is None:
            require(sign in ("=", "!="), field, wanted, "compares with nothing", EXAMPLE)
            return f"{at} is {'' if sign == '=' else 'not '}null", []
        if sign in ("=", "!="):
            return f"{at} is {'' if sign == '=' else 'not '}?", [value]
        kinds = "('integer', 'real')" if isinstance(value, int | float) else "('text')"
        kind = f"json_type(record, '{path(key)}') in {kinds}"  # SQLite would call every text greater than a number
        return f"({kind} and {at} {sign} ?)", [value]
    if isinstance(wanted, str) and "*" in wanted:
        return f"{at} glob ?", [wanted.replace("[", "[[]").replace("?", "[?]")]
    require(not isinstance(wanted, float) or math.isfinite(wanted), field, wanted, "is no finite number", EXAMPLE)
    return f"{at} is ?", [wanted]


def plain(text: str) -> Any:
    """The number, true, false or null that a text is; itself where it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) or value is None else text


def check_keys(index: Index, field: str, keys: Iterable[str], whole: bool = False) -> None:
    """Args:
        whole: a key may hold several keys.

    Raises:
        InputError: runs are there, and none has such a key.
    """
    for key in keys if index.names() else ():
        place(key, field)
        if index.has(path(key), whole):
            continue
        known = index.keys()
        inside = [one for one in known if one.startswith(f"{key}.")]
        if inside:
            raise InputError(field, key, "holds several keys", f"Write one of: {', '.join(inside[:12])}.")
        close = difflib.get_close_matches(key, known, n=1) or [one for one in known if one.endswith(f".{key}")][:1]
        meant = f"Did you mean {close[0]}? " if close else ""
        remedy = f"{meant}`stage.action=show stage.run=STAGE:NAME stage.format=json` shows every key of a run."
        raise InputError(field, key, "is a key that no run here has", remedy)
