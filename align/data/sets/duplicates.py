"""Rows of a spool that say what another one says: copies, and near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from align.data.dedup.groups import packs, sharing
from align.data.dedup.shared_text import find_shared
from align.data.dedup.shingles import BANDS, Shingles
from align.data.dedup.twins import exact, twins
from align.data.sets.columns import whole
from align.data.sets.engines import Engine, embedded
from align.data.sets.gather import HASHES, band_name
from align.data.sets.spool import Rows, Spool

ALL, WITHIN, ACROSS = "all", "within", "across"
PACKS = 2
"""Of documents for each worker: one that is done early takes another."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """One row a duplicate.

    Attributes:
        dropped: its number, int64.
        kept: that of the row, which stays, that it is a duplicate of.
        jaccard: how alike the two are; 1 for copies.
        exact: whether it is a copy.
    """

    dropped: np.ndarray
    kept: np.ndarray
    jaccard: np.ndarray
    exact: np.ndarray


def none_of() -> Duplicates:
    return Duplicates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))


def preference(source: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """The order in which rows survive, int64 (N): by the rank of their source, then by their number."""
    return np.asarray(ranks, np.int64)[source] << 40 | np.arange(len(source))


def copies(rows: Rows, kept: np.ndarray, order: np.ndarray, source: np.ndarray, among: str = ALL) -> Duplicates:
    """The rows whose text another row has, which comes before in `order`, see `align.data.dedup.exact`.

    Args:
        kept: which rows are looked at, bool (N).
        order: see `preference`.
        among: `all` rows; those `within` one source; those `across` sources.
    """
    numbers = np.flatnonzero(kept)
    digests = np.ascontiguousarray(rows.numbers("digest")[numbers]).view("V16").ravel()
    found = exact(digests, order[numbers], sources=None if among == ALL else source[numbers], across=among == ACROSS)
    copied = np.ones(len(found.dropped), bool)
    return Duplicates(numbers[found.dropped], numbers[found.kept], found.jaccard, copied)


def near_duplicates(
    rows: Rows,
    kept: np.ndarray,
    order: np.ndarray,
    source: np.ndarray,
    *,
    threshold: float,
    among: str = ALL,
    engine: Engine = embedded,
) -> Duplicates:
    """Return the documents that are nearly the same as one which stays, see `align.data.dedup.twins`.

    Args:
        kept, order, source, among: see `copies`.
        threshold: the least Jaccard similarity of their word 3-grams.
        engine: compares documents in packs that have no key in common, where it has several workers. Which text is
            shared is found among all of them first.
    """
    numbers = np.flatnonzero(kept)
    compare = partial(near_among, rows.folder, threshold=threshold, among=among)
    if engine.workers == 1:
        return compare(Compared(numbers, order[numbers], source[numbers]))
    sizes = rows.numbers("shingles")[numbers]
    places = np.arange(len(numbers), dtype=np.int32)
    groups = sharing(places, sizes > 0, lambda band: rows.numbers(band_name(band))[numbers], BANDS)
    content = rows.first_bits("digest")[numbers]
    shared = find_shared(groups, places, sizes, content, partial(read_sets, rows, numbers))
    parts = [numbers[pack] for pack in packs(groups, sizes, PACKS * engine.workers)]
    tasks = [Compared(part, order[part], source[part], shared) for part in parts]
    found = joined(none_of(), *(duplicates for _, duplicates in engine(compare, tasks)))
    by_preference = np.lexsort((found.dropped, order[found.dropped]))
    return Duplicates(*(values[by_preference] for values in (found.dropped, found.kept, found.jaccard, found.exact)))


class Compared(NamedTuple):
    """Documents that are compared: the number of each, ascending, its preference, and its source; and the shingles of
    text that many documents share, where these are known."""

    number: np.ndarray
    order: np.ndarray
    source: np.ndarray
    shared: np.ndarray | None = None


def near_among(folder: Path, some: Compared, threshold: float, among: str) -> Duplicates:
    """See `near_duplicates`; documents of a spool in a folder."""
    rows, numbers = Rows(Spool(folder)), some.number
    found = twins(
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
    )
    return Duplicates(numbers[found.dropped], numbers[found.kept], found.jaccard, np.zeros(len(found.dropped), bool))


def read_sets(rows: Rows, numbers: np.ndarray, few: np.ndarray) -> Shingles:
    """Return the shingles of the documents `numbers[few]`."""
    return Shingles.of(whole(rows.take(numbers[few], [HASHES])[HASHES]))


def joined(*found: Duplicates) -> Duplicates:
    """Duplicates of several steps, in their order. The row that one step keeps may be dropped by a later one."""
    names = ("dropped", "kept", "jaccard", "exact")
    return Duplicates(*(np.concatenate([getattr(one, name) for one in found]) for name in names))


def clusters(found: Duplicates) -> np.ndarray:
    """For each duplicate the row under which it is at last, when each goes on to where its kept row went."""
    heads = dict(zip(found.dropped.tolist(), found.kept.tolist(), strict=True))

    def head(row: int) -> int:
        while row in heads:
            row = heads[row]
        return row

    return np.array([head(row) for row in found.kept.tolist()], np.int64)


def duplicate_labels(found: Duplicates, count: int) -> np.ndarray:
    """A label for the rows of each cluster, int64 (N = `count`); -1 for a row without duplicates."""
    labels, heads = np.full(count, -1, np.int64), clusters(found)
    labels[found.dropped] = heads
    labels[heads] = heads
    return labels
