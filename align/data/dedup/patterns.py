"""Documents that are made, for the most part, of what very many others have: rows of a template.

Shingles that many members of a huge group have are no marks (`align.data.dedup.greedy`): by them each member would be
compared with each. So twins either have another shingle in common, which is a mark, or are twins by common shingles
alone. Twins of the latter kind are found here. A product of matrices counts how many common shingles each two documents
share. Documents of the same size with the same common shingles are one row of it: rows of a template that have their
own words at its end are one pattern. All others cost some nanoseconds a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from align.data.dedup.arrays import distinct, held, ranges, spans
from align.data.dedup.shingles import Shingles
from align.data.dedup.words import ODD, mixed

TILE, TILE_COLUMNS = 1 << 10, 1 << 12
"""Patterns that are compared together, and the common shingles that are counted together."""
TILE_VALUES = 1 << 22
"""Common shingles of the patterns of a tile at most."""
SLACK = 1e-6
"""Of a similarity, that rounding may cost."""


@dataclass(frozen=True)
class Patterns:
    """What documents share with many others; each pattern once, by its key."""

    key: np.ndarray
    """uint64 (P): a hash of all of the following, ascending."""
    family: np.ndarray
    """int64 (P): documents of two families have no group in common."""
    source: np.ndarray
    """int64 (P): of the documents."""
    size: np.ndarray
    """int64 (P): shingles of each document, common or not."""
    columns: np.ndarray
    """int32: numbers of common shingles, ascending in each pattern."""
    offsets: np.ndarray
    """int64 (P+1): where the columns of each pattern begin."""

    @classmethod
    def of(
        cls, sets: Shingles, common: np.ndarray, threshold: float, family: np.ndarray, source: np.ndarray
    ) -> tuple[Patterns, np.ndarray, np.ndarray]:
        """The patterns of those documents that are twins of any by their common shingles alone.

        Args:
            common: the common shingles, ascending.
            family, source: of each document.

        Returns:
            beside the patterns, which documents have one (bool), and the keys of these.
        """
        column = np.minimum(np.searchsorted(common, sets.values), max(len(common) - 1, 0))
        there = held(common, sets.values)
        counts = np.diff(np.append(0, np.cumsum(there))[sets.offsets])
        able = (counts > 0) & (counts >= threshold * sets.sizes * (1 - SLACK))  # less than that leaves J below
        there &= np.repeat(able, sets.sizes)
        columns, counts = column[there].astype(np.int32), counts[able]
        about = family[able], source[able], sets.sizes[able]
        key = mixed(columns.astype(np.uint64) * ODD + ODD)
        key = np.add.reduceat(key, np.cumsum(counts) - counts) if len(counts) else key
        for value in about:
            key = mixed(key * ODD ^ value.astype(np.uint64))
        made = cls(key, *about, columns, np.append(0, np.cumsum(counts)))
        return made.take(np.unique(key, return_index=True)[1]), able, key

    def __len__(self) -> int:
        return len(self.key)

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, chosen: np.ndarray) -> Patterns:
        counts = self.counts[chosen]
        columns = self.columns[ranges(self.offsets[:-1][chosen], counts)]
        about = (values[chosen] for values in (self.key, self.family, self.source, self.size))
        return Patterns(*about, columns=columns, offsets=np.append(0, np.cumsum(counts)))

    def among(self, keys: np.ndarray) -> Patterns:
        """Those of these keys (ascending)."""
        there = held(keys, self.key)
        return self if there.all() else self.take(np.flatnonzero(there))

    def tiles(self) -> Iterator[np.ndarray]:
        """Numbers of patterns that are compared together: of one family, those with the same first column together."""
        first = self.columns[self.offsets[:-1]]
        order = np.lexsort((self.size, first, self.family))
        for begin, close in pairwise([0, *(np.flatnonzero(np.diff(self.family[order])) + 1), len(order)]):
            for at, end in spans(self.counts[order[begin:close]], TILE_VALUES, TILE):
                yield order[begin + at : begin + end]


def together(some: Patterns, others: Patterns) -> Patterns:
    """The patterns of both."""
    if not len(others):
        return some
    about = (np.append(getattr(some, name), getattr(others, name)) for name in ("key", "family", "source", "size"))
    offsets = np.append(some.offsets, some.offsets[-1] + others.offsets[1:])
    both = Patterns(*about, columns=np.append(some.columns, others.columns), offsets=offsets)
    return both.take(np.unique(both.key, return_index=True)[1])


def nothing() -> Patterns:
    number = np.zeros(0, np.int64)
    return Patterns(np.zeros(0, np.uint64), number, number, number, np.zeros(0, np.int32), np.zeros(1, np.int64))


def alike(
    some: Patterns, others: Patterns, threshold: float, across: bool | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Which patterns make their documents reach the threshold by themselves.

    Args:
        across: whether only documents of different sources count, or of the same one; None for all.

    Yields:
        Numbers of some patterns, numbers of others, and for each of the former and each of the latter whether it does.
    """
    if not len(some) or not len(others):
        return
    share = threshold / (1 + threshold)  # J >= t if and only if both have t / (1 + t) of their sizes' sum in common
    place = np.full(int(max(some.columns.max(), others.columns.max())) + 1, -1, np.int32)
    theirs = [*others.tiles()]
    for tile in some.tiles():
        a = some.take(tile)
        asked = distinct(a.columns)
        place[asked] = np.arange(len(asked), dtype=np.int32)
        for tile_b in theirs:
            if others.family[tile_b[0]] != a.family[0]:
                continue
            b = others.take(tile_b)
            at = place[b.columns]
            most = np.diff(np.append(0, np.cumsum(at >= 0))[b.offsets])
            may = most >= share * (b.size + a.size.min()) * (1 - SLACK)
            if not may.any():
                continue
            least = share * (1 - SLACK) * (a.size[:, None] + b.size[may])
            found = products(a, b.take(np.flatnonzero(may)), place, len(asked)) >= least
            if across is not None:
                found &= (a.source[:, None] != b.source[may]) == across
            if found.any():
                yield tile, tile_b[may], found
        place[asked] = -1


def products(a: Patterns, b: Patterns, place: np.ndarray, width: int) -> np.ndarray:
    """float32 (A, B): how many columns each two patterns have in common, exact.

    Args:
        place: of each column among the `width` ones of `a`; -1 for those that it has not.
    """
    sides = [(place[one.columns], np.repeat(np.arange(len(one)), one.counts), len(one)) for one in (a, b)]
    common = np.zeros((len(a), len(b)), np.float32)
    for begin in range(0, width, TILE_COLUMNS):
        many = min(TILE_COLUMNS, width - begin)
        dense = []
        for at, row, rows in sides:
            here = (at >= begin) & (at < begin + many)
            dense.append(np.zeros((rows, many), np.float32))
            dense[-1][row[here], at[here] - begin] = 1
        common += dense[0] @ dense[1].T
    return common
