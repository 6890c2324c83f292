"""Exact duplicates and near-duplicates among the rows of a spool."""

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
"""Packs of documents for each worker. A worker that finishes early takes another one."""
NO_DUPLICATES = Duplicates(NO_NUMBERS, NO_NUMBERS, np.zeros(0), np.zeros(0, bool))


def preference(source: ndarray, ranks: Sequence[int]) -> ndarray:
    """Return the rank of preference of each row, int64 (N): by the rank of its source, then by its number.

    Args:
        source: number of each row's source, int (N).
        ranks: rank of each source.
    """
    return np.asarray(ranks, np.int64)[source] << 40 | np.arange(len(source))


def copies(rows: Rows, kept: ndarray, order: ndarray, source: ndarray, among: str = ALL) -> Duplicates:
    """Find the rows whose text equals that of a row earlier in `order`, see `find_exact`.

    Args:
        kept: rows to compare, bool (N).
        order: see `preference`.
        source: number of each row's source, int (N).
        among: compare `all` rows, those `within` one source, or those `across` sources.
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
    """Find the documents that are near-duplicates of a document that is kept, see `align.data.dedup.near_duplicates`.

    Args:
        kept, order, source, among: see `copies`.
        threshold: least Jaccard similarity of the word 3-grams.
        engine: runs the comparison. With several workers, it compares packs of documents that have no key in common,
            after shared text was found among all documents.
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
    duplicates = joined([of_pack for _, of_pack in engine(compare, tasks)])
    by_preference = np.lexsort((duplicates.dropped, order[duplicates.dropped]))
    return Duplicates(*(column[by_preference] for column in duplicates))


class Compared(NamedTuple):
    """Documents to compare with each other.

    Attributes:
        number: number of each document's row, ascending.
        order: its rank of preference.
        source: number of its source.
        shared: shingles of text that many documents share. None if they have to be found.
    """

    number: ndarray
    order: ndarray
    source: ndarray
    shared: ndarray | None = None


def near_among(folder: Path, task: Compared, threshold: float, among: str) -> Duplicates:
    """Find the near-duplicates among some documents of the spool in `folder`, see `near_duplicates`."""
    rows = Rows(Spool(folder))
    numbers = task.number
    return find_near(
        task.order,
        rows.numbers("shingles")[numbers],
        lambda band: rows.numbers(band_name(band))[numbers],
        partial(read_sets, rows, numbers),
        threshold,
        sources=None if among == ALL else task.source,
        across=among == ACROSS,
        numbers=rows.numbers("numbers")[numbers],
        content=rows.first_bits("digest")[numbers] if task.shared is None else None,
        shared=task.shared,
    ).renumbered(numbers)


def read_sets(rows: Rows, numbers: ndarray, places: ndarray) -> Shingles:
    """Load the shingles of the documents `numbers[places]`."""
    return Shingles.of(whole(rows.take(numbers[places], [HASHES])[HASHES]))


def joined(steps: Sequence[Duplicates]) -> Duplicates:
    """Concatenate the duplicates of several steps. The row that one step keeps may be dropped by a later step."""
    return Duplicates(*join_columns([NO_DUPLICATES, *steps]))


def clusters(duplicates: Duplicates) -> ndarray:
    """Return the row that is finally kept for each duplicate, by following kept rows that were dropped themselves."""
    heads = dict(zip(duplicates.dropped.tolist(), duplicates.kept.tolist(), strict=True))
    final_rows = duplicates.kept.tolist()
    for i, row in enumerate(final_rows):
        while row in heads:
            row = heads[row]
        final_rows[i] = row
    return np.array(final_rows, np.int64)


def duplicate_labels(duplicates: Duplicates, count: int) -> ndarray:
    """Label the rows of each cluster of duplicates, int64 (`count`). Rows without duplicates get -1."""
    labels = np.full(count, -1, np.int64)
    heads = clusters(duplicates)
    labels[duplicates.dropped] = heads
    labels[heads] = heads
    return labels
