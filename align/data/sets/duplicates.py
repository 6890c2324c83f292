"""Rows of a spool that say what another one says: copies, and near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from align.data.dedup.arrays import NO_NUMBERS, join_columns
from align.data.dedup.near_duplicates import Duplicates, find_exact, find_near, find_shared, packs, sharing
from align.data.dedup.shingles import Shingles
from align.data.sets.gather import HASHES, band_name
from align.data.sets.parallel import TaskRunner, embedded
from align.data.sets.record_columns import whole
from align.data.sets.spool import Rows, Spool

ALL = "all"
ACROSS = "across"
PACKS = 2
"""Of documents for each worker: one that is done early takes another."""


NO_DUPLICATES = Duplicates(NO_NUMBERS, NO_NUMBERS, np.zeros(0), np.zeros(0, bool))


def preference(source: ndarray, ranks: Sequence[int]) -> ndarray:
    """Return the order in which rows survive, int64 (N): by the rank of their source, then by their number."""
    return np.asarray(ranks, np.int64)[source] << 40 | np.arange(len(source))


def copies(rows: Rows, kept: ndarray, order: ndarray, source: ndarray, among: str = ALL) -> Duplicates:
    """Return the rows whose text another row has, which comes before in `order`, see `find_exact`.

    Args:
        kept: which rows are looked at, bool (N).
        order: see `preference`.
        among: `all` rows; those `within` one source; those `across` sources.
    """
    numbers = np.flatnonzero(kept)
    digests = np.ascontiguousarray(rows.numbers("digest")[numbers]).view("V16").ravel()
    sources = None if among == ALL else source[numbers]
    return find_exact(digests, order[numbers], sources, across=among == ACROSS).renumbered(numbers)


def near_duplicates(
    rows: Rows,
    kept: ndarray,
    order: ndarray,
    source: ndarray,
    *,
    threshold: float,
    among: str = ALL,
    engine: TaskRunner = embedded,
) -> Duplicates:
    """Return the documents that are nearly the same as one which stays, see `align.data.dedup.near_duplicates`.

    Args:
        kept, order, source, among: see `copies`.
        threshold: the least Jaccard similarity of their word 3-grams.
        engine: compares documents in packs that have no key in common, if it has several workers. Which text is
            shared is found among all of them first.
    """
    numbers = np.flatnonzero(kept)
    compare = partial(near_among, rows.folder, threshold=threshold, among=among)
    if engine.workers == 1:
        return compare(Compared(numbers, order[numbers], source[numbers]))
    sizes = rows.numbers("shingles")[numbers]
    places = np.arange(len(numbers), dtype=np.int32)
    groups = sharing(places, sizes > 0, lambda band: rows.numbers(band_name(band))[numbers])
    content = rows.first_bits("digest")[numbers]
    shared = find_shared(groups, places, sizes, content, partial(read_sets, rows, numbers))
    parts = [numbers[pack] for pack in packs(groups, sizes, PACKS * engine.workers)]
    tasks = [Compared(part, order[part], source[part], shared) for part in parts]
    found = joined([duplicates for _, duplicates in engine(compare, tasks)])
    by_preference = np.lexsort((found.dropped, order[found.dropped]))
    return Duplicates(*(column[by_preference] for column in found))


class Compared(NamedTuple):
    """Documents that are compared: the number of each, ascending, its preference, and its source; and the shingles of
    text that many documents share, where these are known."""

    number: ndarray
    order: ndarray
    source: ndarray
    shared: ndarray | None = None


def near_among(folder: Path, some: Compared, threshold: float, among: str) -> Duplicates:
    """Return the near-duplicates among documents of a spool in a folder, see `near_duplicates`."""
    rows = Rows(Spool(folder))
    numbers = some.number
    return find_near(
        some.order,
        rows.numbers("shingles")[numbers],
        lambda band: rows.numbers(band_name(band))[numbers],
        partial(read_sets, rows, numbers),
        threshold,
        sources=None if among == ALL else some.source,
        across=among == ACROSS,
        numbers=rows.numbers("numbers")[numbers],
        content=rows.first_bits("digest")[numbers] if some.shared is None else None,
        shared=some.shared,
    ).renumbered(numbers)


def read_sets(rows: Rows, numbers: ndarray, few: ndarray) -> Shingles:
    """Return the shingles of the documents `numbers[few]`."""
    return Shingles.of(whole(rows.take(numbers[few], [HASHES])[HASHES]))


def joined(found: Sequence[Duplicates]) -> Duplicates:
    """Return duplicates of several steps, in their order. The row that one step keeps may be dropped by a later
    one."""
    return Duplicates(*join_columns([NO_DUPLICATES, *found]))


def clusters(found: Duplicates) -> ndarray:
    """Return for each duplicate the row under which it is at last, when each goes on to where its kept row went."""
    heads = dict(zip(found.dropped.tolist(), found.kept.tolist(), strict=True))
    last = found.kept.tolist()
    for i, row in enumerate(last):
        while row in heads:
            row = heads[row]
        last[i] = row
    return np.array(last, np.int64)


def duplicate_labels(found: Duplicates, count: int) -> ndarray:
    """Return a label for the rows of each cluster, int64 (N = `count`); -1 for a row without duplicates."""
    labels = np.full(count, -1, np.int64)
    heads = clusters(found)
    labels[found.dropped] = heads
    labels[heads] = heads
    return labels
