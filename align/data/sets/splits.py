"""Division of a data set into a training split and a test split.

Rows that belong together form a unit, and a unit is in one split: rows with the same question, rows of one group, and
duplicates. The hash of one question of a unit decides its split, so that a row stays in its split when other rows that
are not linked to it are added.
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
from align.data.dedup.arrays import label_components
from align.data.sets.record_columns import combine_column

pc: Any = pyarrow.compute  # whose functions are made when it is imported

TRAIN = 0
TEST = 1
SPLITS = ("train", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "validation", "valid", "val", "dev", "eval"), TEST),
}
"""Name of a split in a column → its number."""
EARLIEST = 1e8
LATEST = 1e10
"""Bounds of numbers that are read as seconds since 1970."""


def assign_units(questions: ndarray, *links: ndarray) -> ndarray:
    """Return for each row an id (a hash) of the unit of linked rows that it belongs to, uint64 (N). It is the hash with
    the smallest lower half of the hashes of all linked rows.

    Its upper half decides the split of the unit, and is distributed as evenly among units as among questions.

    Args:
        questions: hash of each row's question, uint64 (N). Rows with the same hash are linked.
        links: further labels, int64 (N) each. Rows with the same label are linked, except for negative labels.
    """
    pairs = []
    for labels in (questions, *links):
        labeled = np.flatnonzero(labels >= 0)
        order = labeled[np.argsort(labels[labeled], kind="stable")]
        same = labels[order[1:]] == labels[order[:-1]]
        pairs.append((order[:-1][same], order[1:][same]))
    root = label_components(len(questions), *(np.concatenate(ends) for ends in zip(*pairs, strict=True)))
    smallest = exchange_halves(questions)
    np.minimum.at(smallest, root, smallest.copy())
    return exchange_halves(smallest[root])


def exchange_halves(hashes: ndarray) -> ndarray:
    """Return each 64-bit hash with its upper and lower 32 bits swapped."""
    half = np.uint64(32)
    return hashes << half | hashes >> half


def label_groups(groups: pa.ChunkedArray, source: ndarray) -> ndarray:
    """Return the number of each row's group, int64 (N), or -1 for a row without a group. Groups of different sources
    are different.

    Args:
        groups: name of each row's group, null for none.
        source: number of each row's source, int (N).
    """
    codes = combine_column(groups).dictionary_encode().indices
    labels = pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.where(labels < 0, -1, labels * (int(source.max(initial=0)) + 1) + source)


def select_held_out(units: ndarray, held_out: float) -> ndarray:
    """Return whether each row is in the test split, bool (N), by the hash of its unit of linked rows.

    The first 32 bits of a unit are a number in [0, 1), and units below `held_out` are held out, as for a plain file
    (`align.data.split.select_held_out_keys`). At least one unit is held out if there are two.

    Args:
        units: see `assign_units`.
        held_out: share of units in the test split; 0 for none.
    """
    shares = (units >> np.uint64(32)).astype(np.float64) / 2**32
    lowest_share = shares.min() if held_out > 0 and len(units) and shares.min() < shares.max() else -1.0
    return (shares < held_out) | (shares == lowest_share)


def extend_to_units(units: ndarray, is_test: ndarray) -> ndarray:
    """Return whether each row is in the test split or linked to a row of it (in the same unit), bool (N).

    Args:
        is_test: whether each row is in the test split, bool (N).
    """
    return np.isin(units, np.unique(units[is_test]))


def parse_split_column(names: Sequence[str | None], column: str) -> ndarray:
    """Return whether each row is in the test split according to its value in the split column, bool (N).

    Raises:
        InputError: A row does not name a split.
    """
    check_column_exists(names, column)
    splits = {name: SPLIT_NAMES.get((name or "").strip().lower()) for name in dict.fromkeys(names)}
    for name, split in splits.items():
        if split is None:
            problem = f"names no split (train or test), in {sum(value == name for value in names)} rows"
            raise InputError(f"stage.split.column={column}", name, problem, f"Write one of {', '.join(SPLIT_NAMES)}.")
    return np.array([splits[name] == TEST for name in names], bool)


def check_column_exists(values: Sequence[str | None], column: str) -> None:
    """Raise InputError if the column that the split setting names is null in all rows."""
    is_present = any(value is not None for value in values)
    remedy = "Name a column that the rows have; where columns are mapped, by its new name."
    require(is_present, "stage.split.column", column, "is a column that no row has", remedy)


def is_written_since(times: Sequence[str | None], since: str, column: str) -> ndarray:
    """Return whether the time of each row is `since` or later, bool (N).

    Args:
        times: time of each row, see `parse_timestamp`.

    Raises:
        InputError: A row has no time, or an invalid one.
    """
    check_column_exists(times, column)
    start = parse_timestamp(since, "stage.split.since")
    return np.array([parse_timestamp(time, f"stage.split.column={column}") >= start for time in times], bool)


def parse_timestamp(text: str | None, field: str) -> float:
    """Return an ISO 8601 time (UTC if it has no zone), or a number of seconds or milliseconds since 1970, in seconds
    since 1970.

    Raises:
        InputError: The text is no time. A number has to lie between 1973 and 2286, so that a year or a day is not
            mistaken for one.
    """
    stripped = (text or "").strip()
    with suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(stripped)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    with suppress(ValueError):
        number = float(stripped)
        for unit in (1, 1000):
            if EARLIEST <= number / unit <= LATEST:
                return number / unit
    remedy = "Write times as 2026-11-26 or 2026-11-26T12:00:00Z, in every row."
    raise InputError(field, text, "is no time", remedy)
