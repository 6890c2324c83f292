"""Which rows of a data set are trained on and which are measured on.

Rows that belong together form a unit, and a unit is on one side: rows that ask the same question, rows of one group,
and rows that are duplicates of one another. A unit goes by the hash of one question in it, so that a row stays on its
side when others come in that are not linked to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy import ndarray

from align.core.errors import InputError, require
from align.data.dedup.arrays import components
from align.data.sets.record_columns import whole

pc: Any = pyarrow.compute  # whose functions are made when it is imported

TRAIN, TEST = 0, 1
SIDES = ("train", "test")
NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "validation", "valid", "val", "dev", "eval"), TEST),
}
"""What a column may call a side."""
EARLIEST, LATEST = 1e8, 1e10


def units(questions: ndarray, *links: ndarray) -> ndarray:
    """Return the unit of each row, named by the smallest question in it.

    Args:
        questions: hash of what each row asks, uint64 (N). Rows of one hash belong together.
        links: further labels, int64 (N): rows of one label belong together; a negative label is none.

    Returns:
        uint64 (N): of the hashes of the rows that are linked to this one, directly or by way of others, that with the
        smallest lower half. The upper half says which side it is on, and is as even among units as among questions.
    """
    pairs = []
    for labels in (questions, *links):
        chosen = np.flatnonzero(labels >= 0)
        order = chosen[np.argsort(labels[chosen], kind="stable")]
        same = labels[order[1:]] == labels[order[:-1]]
        pairs.append((order[:-1][same], order[1:][same]))
    root = components(len(questions), *(np.concatenate(ends) for ends in zip(*pairs, strict=True)))
    smallest = exchange_halves(questions)
    np.minimum.at(smallest, root, smallest.copy())
    return exchange_halves(smallest[root])


def exchange_halves(hashes: ndarray) -> ndarray:
    half = np.uint64(32)
    return hashes << half | hashes >> half


def group_labels(groups: pa.ChunkedArray, source: ndarray) -> ndarray:
    """Return a label for each group's rows, int64 (N); -1 if a row is in none. Two sources may use one name for two
    groups.

    Args:
        source: the number of each row's source.
    """
    codes = whole(groups).dictionary_encode().indices
    labels = pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.where(labels < 0, -1, labels * (int(source.max(initial=0)) + 1) + source)


def held_back(units: ndarray, held_out: float) -> ndarray:
    """Return whether each row is measured on: the first 32 bits of its unit are a number in [0, 1), and units below
    `held_out` are held back, as for a plain file (`align.data.split.select_held_out_keys`); at least one unit
    is, if there are two.

    Args:
        units: see `units`.
        held_out: the share of units; 0 for none.
    """
    shares = (units >> np.uint64(32)).astype(np.float64) / 2**32
    least = shares.min() if held_out > 0 and len(units) and shares.min() < shares.max() else -1.0
    return (shares < held_out) | (shares == least)


def whole_units(units: ndarray, test: ndarray) -> ndarray:
    """Return whether each row is in a unit of which any row is measured on."""
    return np.isin(units, np.unique(units[test]))


def named_sides(names: Sequence[str | None], column: str) -> ndarray:
    """Return whether each row is measured on, by what its column says.

    Raises:
        InputError: a row says no side.
    """
    check_column(names, column)
    sides = {name: NAMES.get((name or "").strip().lower()) for name in dict.fromkeys(names)}
    for name, side in sides.items():
        if side is None:
            problem = f"names no side, in {sum(other == name for other in names)} rows"
            raise InputError(f"stage.split.column={column}", name, problem, f"Write one of {', '.join(NAMES)}.")
    return np.array([sides[name] == TEST for name in names], bool)


def check_column(values: Sequence[str | None], column: str) -> None:
    """Raise InputError if no row has this column."""
    there = any(value is not None for value in values)
    remedy = "Name a column that the rows have; where columns are mapped, by its new name."
    require(there, "stage.split.column", column, "is a column that no row has", remedy)


def written_since(times: Sequence[str | None], since: str, column: str) -> ndarray:
    """Return whether each row was written at a time or later. Times are ISO 8601, or seconds since 1970; without a
    zone, UTC.

    Raises:
        InputError: a row has no time, or none that is understood.
    """
    check_column(times, column)
    start = seconds(since, "stage.split.since")
    return np.array([seconds(time, f"stage.split.column={column}") >= start for time in times], bool)


def seconds(given: str | None, field: str) -> float:
    """Return the seconds since 1970 of an ISO 8601 time (without a zone, UTC), or of a number of seconds or
    milliseconds since.

    Raises:
        InputError: it is none of them. A number is one only if it lies between 1973 and 2286, so that no year or day
            passes for one.
    """
    text = (given or "").strip()
    with suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    with suppress(ValueError):
        number = float(text)
        for unit in (1, 1000):
            if EARLIEST <= number / unit <= LATEST:
                return number / unit
    remedy = "Write times as 2026-11-26 or 2026-11-26T12:00:00Z, in every row."
    raise InputError(field, given, "is no time", remedy)
