"""Exact duplicates and near-duplicates among the rows of a data set under construction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from align.data.dedup.arrays import NO_NUMBERS, concatenate_columns
from align.data.dedup.near_duplicates import (
    Duplicates,
    find_exact,
    find_near,
    find_shared_shingles,
    list_groups_with_equal_bands,
    split_into_packs,
)
from align.data.dedup.shingles import Shingles
from align.data.sets.gather import HASHES, name_band_column
from align.data.sets.parallel import TaskRunner, in_process_runner
from align.data.sets.record_columns import combine_column
from align.data.sets.spool import Spool, SpoolRows

ALL = "all"
ACROSS = "across"
PACKS = 2
"""Number of packs of documents for each worker. A worker that finishes early takes another one."""
NO_DUPLICATES = Duplicates(NO_NUMBERS, NO_NUMBERS, np.zeros(0), np.zeros(0, bool))


def rank_rows(source: ndarray, ranks: Sequence[int]) -> ndarray:
    """Return the rank of preference of each row, int64 (N): by the rank of its source, then by its row number.

    Args:
        source: number of each row's source, int (N).
        ranks: rank of each source.
    """
    return np.asarray(ranks, np.int64)[source] << 40 | np.arange(len(source))


def find_exact_duplicates(
    rows: SpoolRows, mask: ndarray, preference: ndarray, source: ndarray, among: str = ALL
) -> Duplicates:
    """Return the rows to drop because their normalised text equals that of a more preferred row, each with the row to
    keep. Pairs and feedback are compared by their content.

    Args:
        mask: rows to compare, bool (N).
        preference: see `rank_rows`.
        source: number of each row's source, int (N).
        among: compare `all` rows, those `within` one source, or those `across` sources.
    """
    numbers = np.flatnonzero(mask)
    digests = np.ascontiguousarray(rows.load_numbers("digest")[numbers]).view("V16").ravel()
    sources = None if among == ALL else source[numbers]
    return find_exact(digests, preference[numbers], sources, only_across_sources=among == ACROSS).renumber(numbers)


def find_near_duplicates(
    rows: SpoolRows,
    mask: ndarray,
    preference: ndarray,
    source: ndarray,
    *,
    threshold: float,
    among: str = ALL,
    runner: TaskRunner = in_process_runner,
) -> Duplicates:
    """Return the rows to drop because they are near-duplicates of a more preferred row, each with the row to keep. See
    `align.data.dedup.near_duplicates`.

    Args:
        mask, preference, source, among: see `find_exact_duplicates`.
        threshold: least Jaccard similarity of the word 3-grams.
        runner: runs the comparison. With several workers, it compares packs of documents that have no key in common,
            after shared text was found among all documents.
    """
    numbers = np.flatnonzero(mask)
    compare = partial(find_near_in_task, rows.folder, threshold=threshold, among=among)
    if runner.workers == 1:
        return compare(ComparisonTask(numbers, preference[numbers], source[numbers]))
    sizes = rows.load_numbers("shingles")[numbers]
    places = np.arange(len(numbers), dtype=np.int32)
    groups = list_groups_with_equal_bands(
        places, sizes > 0, lambda band: rows.load_numbers(name_band_column(band))[numbers]
    )
    content = rows.load_first_bits("digest")[numbers]
    shared = find_shared_shingles(groups, places, sizes, content, partial(load_shingles, rows, numbers))
    parts = [numbers[pack] for pack in split_into_packs(groups, sizes, PACKS * runner.workers)]
    tasks = [ComparisonTask(part, preference[part], source[part], shared) for part in parts]
    duplicates = concatenate_duplicates([of_pack for _, of_pack in runner(compare, tasks)])
    by_preference = np.lexsort((duplicates.dropped, preference[duplicates.dropped]))
    return Duplicates(*(column[by_preference] for column in duplicates))


class ComparisonTask(NamedTuple):
    """Rows that one task compares with each other.

    Attributes:
        number: number of each document's row, ascending.
        preference: its rank of preference.
        source: number of its source.
        shared: shingles of text that many documents share. None if they have to be found.
    """

    number: ndarray
    preference: ndarray
    source: ndarray
    shared: ndarray | None = None


def find_near_in_task(folder: Path, task: ComparisonTask, threshold: float, among: str) -> Duplicates:
    """Return the near-duplicates to drop among the rows of a task, which a worker reads from the files in `folder`."""
    rows = SpoolRows(Spool(folder))
    numbers = task.number
    return find_near(
        task.preference,
        rows.load_numbers("shingles")[numbers],
        lambda band: rows.load_numbers(name_band_column(band))[numbers],
        partial(load_shingles, rows, numbers),
        threshold,
        sources=None if among == ALL else task.source,
        only_across_sources=among == ACROSS,
        numbers=rows.load_numbers("numbers")[numbers],
        content=rows.load_first_bits("digest")[numbers] if task.shared is None else None,
        shared=task.shared,
    ).renumber(numbers)


def load_shingles(rows: SpoolRows, numbers: ndarray, places: ndarray) -> Shingles:
    """Load the sets of shingles of the rows `numbers[places]`."""
    return Shingles.from_column(combine_column(rows.take(numbers[places], [HASHES])[HASHES]))


def concatenate_duplicates(steps: Sequence[Duplicates]) -> Duplicates:
    """Concatenate the duplicates that several steps have found. The row that one step keeps may be dropped by a later
    step."""
    return Duplicates(*concatenate_columns([NO_DUPLICATES, *steps]))


def find_cluster_heads(duplicates: Duplicates) -> ndarray:
    """Return for each duplicate the row that is kept in its place after all steps. Kept rows that a later step dropped
    are followed."""
    heads = dict(zip(duplicates.dropped.tolist(), duplicates.kept.tolist(), strict=True))
    final_rows = duplicates.kept.tolist()
    for i, row in enumerate(final_rows):
        while row in heads:
            row = heads[row]
        final_rows[i] = row
    return np.array(final_rows, np.int64)


def label_clusters(duplicates: Duplicates, count: int) -> ndarray:
    """Return for each row the number of the row that its cluster of duplicates keeps, int64 (`count`). Rows without
    duplicates get -1."""
    labels = np.full(count, -1, np.int64)
    heads = find_cluster_heads(duplicates)
    labels[duplicates.dropped] = heads
    labels[heads] = heads
    return labels
