"""Rows of a spool that say what another one says: copies, and near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from align.data.dedup.exact import exact
from align.data.dedup.shingles import Shingles
from align.data.dedup.twins import twins
from align.data.sets.columns import whole
from align.data.sets.gather import RUNS, band_name
from align.data.sets.spool import Rows

ALL, WITHIN, ACROSS = "all", "within", "across"


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
    rows: Rows, kept: np.ndarray, order: np.ndarray, source: np.ndarray, *, threshold: float, among: str = ALL
) -> Duplicates:
    """The documents that are nearly the same as one which stays, see `align.data.dedup.twins`.

    Args:
        kept, order, source, among: see `copies`.
        threshold: the least Jaccard similarity of their word 3-grams.
    """
    numbers = np.flatnonzero(kept)
    found = twins(
        order[numbers], rows.numbers("shingles")[numbers],
        lambda band: rows.numbers(band_name(band))[numbers],
        lambda some: Shingles.of(whole(rows.take(numbers[some], [RUNS])[RUNS])),
        threshold, sources=None if among == ALL else source[numbers], across=among == ACROSS,
    )  # fmt: skip
    return Duplicates(numbers[found.dropped], numbers[found.kept], found.jaccard, np.zeros(len(found.dropped), bool))


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
