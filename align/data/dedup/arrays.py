"""Arrays and sets of hashes: what NumPy has no function for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    import pyarrow as pa

Texts: TypeAlias = "pa.Array | pa.ChunkedArray"
"""N strings, or large strings; null is the empty text."""
NO_NUMBERS = np.zeros(0, np.int64)
NO_HASHES = np.zeros(0, np.uint64)


def join(parts: Iterable[ndarray], empty: ndarray = NO_NUMBERS) -> ndarray:
    """Return arrays one behind the other; `empty` if there is none."""
    return np.concatenate([empty, *parts])


def join_columns(rows: Iterable[Sequence[ndarray]]) -> list[ndarray]:
    """Return columns that come in pieces, each in one piece. There is at least one row."""
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def is_new(*columns: ndarray) -> ndarray:
    """Return whether each row differs from the one before it, in any column; bool (N)."""
    new = np.ones(len(columns[0]), bool)
    np.not_equal(columns[0][1:], columns[0][:-1], out=new[1:])
    for column in columns[1:]:
        new[1:] |= column[1:] != column[:-1]
    return new


def spans(costs: ndarray, budget: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive spans `(from, to)` of at most `most` items that cost at most `budget` together, or of one
    item."""
    ends = np.cumsum(costs, dtype=np.int64)
    at = 0
    while at < len(costs):
        limit = (ends[at - 1] if at else 0) + budget
        end = min(max(int(np.searchsorted(ends, limit, "right")), at + 1), at + most, len(costs))
        yield at, end
        at = end


def ranges(starts: ndarray, counts: ndarray) -> ndarray:
    """Return `starts[i], starts[i] + 1, …`, `counts[i]` numbers of each, one after another (int64)."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def distinct(values: ndarray) -> ndarray:
    """Return the values in ascending order, each one once. `np.unique` hashes, which is slower."""
    ranked = np.sort(values)
    return ranked[is_new(ranked)]


def held(ranked: ndarray, asked: ndarray) -> ndarray:
    """Return which of the values asked for are among those in ascending order (bool)."""
    if not len(ranked):
        return np.zeros(len(asked), bool)
    return ranked[np.minimum(np.searchsorted(ranked, asked), len(ranked) - 1)] == asked


def components(count: int, a: ndarray, b: ndarray) -> ndarray:
    """Return the smallest number that each of `count` is linked to, directly or by way of others (int64).

    Args:
        a, b: numbers that are linked, pair by pair.

    Source: hooking and pointer jumping, Shiloach and Vishkin 1982, "An O(log n) parallel connectivity algorithm".
    """
    root = np.arange(count)
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, above := root[root]):
            root = above
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
    return root


def count_shared(
    a: ndarray, starts_a: ndarray, counts_a: ndarray, b: ndarray, starts_b: ndarray, counts_b: ndarray, bits: int
) -> ndarray:
    """Return how many values two slices, of `a` and of `b`, have in common, for each pair of slices (int64).

    Values are integers under 2^bits, each one once in a slice; there are at most 2^(64 - bits) pairs.
    """
    pair = np.arange(len(starts_a), dtype=np.uint64) << np.uint64(bits)
    both = np.concatenate(
        [
            a[ranges(starts_a, counts_a)].astype(np.uint64, copy=False) | np.repeat(pair, counts_a),
            b[ranges(starts_b, counts_b)].astype(np.uint64, copy=False) | np.repeat(pair, counts_b),
        ]
    )
    both.sort()
    twice = both[1:][both[1:] == both[:-1]] >> np.uint64(bits)  # what both slices hold stands there twice
    return np.bincount(twice.astype(np.int64), minlength=len(pair))


class HashTable:
    """Owners by hashes: which texts have a run of words, a mark or a whole question. A bitmap stands in front: most
    hashes that are looked up are absent, and need no search.

    Args:
        hashes: uint64, ascending, of which the low bits count.
        owners: integers, the owner of each; a hash may have several.
    """

    def __init__(self, hashes: ndarray, owners: ndarray) -> None:
        self.hashes = hashes
        self.owners = owners
        bits = min(max(16 * len(hashes), 1 << 12).bit_length(), 26)
        self.mask = np.uint64((1 << bits) - 1)
        bitmap = np.zeros(1 << bits, bool)
        bitmap[(hashes & self.mask).astype(np.int64)] = True
        self.bitmap = np.packbits(bitmap, bitorder="little")

    @classmethod
    def sort(cls, hashes: ndarray, owners: ndarray) -> HashTable:
        """Return a table of hashes in any order. Owners of one hash stay in order."""
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], owners[order])

    @classmethod
    def of_values(cls, values: ndarray) -> HashTable:
        """Return a table of hashes that are looked up for whether they are there."""
        values = distinct(values)
        return cls(values, np.arange(len(values)))

    def may_hold(self, hashes: ndarray) -> ndarray:
        """Return which hashes may be here, bool (N): all that are, and few others."""
        places = (hashes & self.mask).astype(np.int64)
        return (self.bitmap[places >> 3] >> (places & 7).astype(np.uint8) & 1).view(bool)

    def holds(self, hashes: ndarray) -> ndarray:
        """Return which hashes are here, bool (N)."""
        inside = self.may_hold(hashes)
        inside[inside] = held(self.hashes, hashes[inside])
        return inside

    def find(self, hashes: ndarray) -> tuple[ndarray, ndarray]:
        """Return places in `hashes`, ascending, and the owners of each of these here."""
        places = np.flatnonzero(self.may_hold(hashes))
        begins = np.searchsorted(self.hashes, hashes[places])
        counts = np.searchsorted(self.hashes, hashes[places], "right") - begins
        return np.repeat(places, counts), self.owners[ranges(begins, counts)]

    def find_pairs(self, hashes: ndarray, owners: ndarray) -> tuple[ndarray, ndarray]:
        """Return owners of these hashes, and owners of equal ones here; each pair once, int64 below 2^32."""
        places, here = self.find(hashes)
        pairs = distinct(owners[places] << 32 | here)
        return pairs >> 32, pairs & 0xFFFFFFFF


BITS, PROBES = 24, 14
"""Bits a hash, at least, and how many are looked at: of the hashes that were never added, at most some 1 in 90,000 are
taken for one that was, (1 - exp(-14/24))^14."""


class BloomFilter:
    """Which hashes may have been added (Bloom 1970). Places of a hash by Kirsch and Mitzenmacher 2006.

    Args:
        count: how many hashes are to be added.
    """

    def __init__(self, count: int) -> None:
        self.bits = max(BITS * count, 1 << 16).bit_length()
        self.table = np.zeros(1 << self.bits - 3, np.uint8)

    def add(self, hashes: ndarray) -> None:
        """Args: hashes: uint64 (N), of which every bit counts."""
        for probe in range(PROBES):
            np.bitwise_or.at(self.table, *self._place(hashes, probe))

    def maybe(self, hashes: ndarray) -> ndarray:
        """Return which of these hashes (uint64 (N)) were added, bool (N): all of those, and few others."""
        left = np.arange(len(hashes))
        for probe in range(PROBES):
            at, bit = self._place(hashes[left], probe)
            left = left[self.table[at] & bit != 0]
        found = np.zeros(len(hashes), bool)
        found[left] = True
        return found

    def _place(self, hashes: ndarray, probe: int) -> tuple[ndarray, ndarray]:
        """Return the byte that a hash is looked for in (int64), and its bit there (uint8)."""
        step = hashes >> np.uint64(32) | np.uint64(1)
        place = hashes + np.uint64(probe) * step & np.uint64((1 << self.bits) - 1)
        return (place >> np.uint64(3)).astype(np.int64), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)
