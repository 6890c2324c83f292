"""Functions for arrays and sets of hashes that NumPy lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    import pyarrow as pa

Texts: TypeAlias = "pa.Array | pa.ChunkedArray"
"""A pyarrow array of N strings, or large strings. Null is the empty text."""
NO_NUMBERS = np.zeros(0, np.int64)
NO_HASHES = np.zeros(0, np.uint64)


def concatenate(parts: Iterable[ndarray], empty: ndarray = NO_NUMBERS) -> ndarray:
    """Concatenate arrays behind `empty`, which is by default an int64 array of length 0."""
    return np.concatenate([empty, *parts])


def concatenate_columns(rows: Iterable[Sequence[ndarray]]) -> list[ndarray]:
    """Concatenate pieces of one table, each a sequence of column arrays, and return one array per column.

    Args:
        rows: one or more pieces, each with the same columns.
    """
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def differs_from_previous(*columns: ndarray) -> ndarray:
    """Return whether each row differs from the row before it in any column, bool (N). The first row counts as
    different."""
    is_changed = np.ones(len(columns[0]), bool)
    np.not_equal(columns[0][1:], columns[0][:-1], out=is_changed[1:])
    for column in columns[1:]:
        is_changed[1:] |= column[1:] != column[:-1]
    return is_changed


def split_by_budget(costs: ndarray, budget: int, max_items: int) -> Iterator[tuple[int, int]]:
    """Yield consecutive spans `(start, end)` of at most `max_items` items whose costs add up to at most `budget`.

    An item that costs more is a span of its own.
    """
    ends = np.cumsum(costs, dtype=np.int64)
    start = 0
    while start < len(costs):
        limit = (ends[start - 1] if start else 0) + budget
        end = min(max(int(np.searchsorted(ends, limit, "right")), start + 1), start + max_items, len(costs))
        yield start, end
        start = end


def concatenate_ranges(starts: ndarray, counts: ndarray) -> ndarray:
    """Concatenate the ranges `starts[i], starts[i] + 1, …` of `counts[i]` numbers each (int64)."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def sort_unique(values: ndarray) -> ndarray:
    """Return the distinct values of an array in ascending order. Sorting is faster than `np.unique`, which hashes."""
    sorted_values = np.sort(values)
    return sorted_values[differs_from_previous(sorted_values)]


def is_in_sorted(sorted_values: ndarray, values: ndarray) -> ndarray:
    """Return whether each value is in a sorted array, bool (N).

    Args:
        sorted_values: ascending.
        values: the values to look up.
    """
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    return sorted_values[np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)] == values


def label_components(node_count: int, a: ndarray, b: ndarray) -> ndarray:
    """Return for each node of a graph the smallest node of its connected component, int64 (`node_count`).

    Args:
        node_count: number of nodes, which are numbered from 0.
        a, b: the two ends of each edge.

    Source: hooking and pointer jumping, Shiloach and Vishkin 1982, "An O(log n) parallel connectivity algorithm".
    """
    root = np.arange(node_count)
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, above := root[root]):
            root = above
        a = root[a]
        b = root[b]
        differs = a != b
        a = a[differs]
        b = b[differs]
    return root


def count_shared_values(
    a: ndarray, starts_a: ndarray, counts_a: ndarray, b: ndarray, starts_b: ndarray, counts_b: ndarray, bits: int
) -> ndarray:
    """Return the number of values that a slice of `a` and a slice of `b` have in common, for each pair of slices
    (int64).

    Values are integers below 2^bits and differ within a slice. At most 2^(64 - bits) pairs fit.
    """
    pair_bits = np.arange(len(starts_a), dtype=np.uint64) << np.uint64(bits)
    merged = np.concatenate(
        [
            a[concatenate_ranges(starts_a, counts_a)].astype(np.uint64, copy=False) | np.repeat(pair_bits, counts_a),
            b[concatenate_ranges(starts_b, counts_b)].astype(np.uint64, copy=False) | np.repeat(pair_bits, counts_b),
        ]
    )
    merged.sort()
    shared_pairs = merged[1:][merged[1:] == merged[:-1]] >> np.uint64(bits)  # a value of both slices occurs twice
    return np.bincount(shared_pairs.astype(np.int64), minlength=len(pair_bits))


class HashMatches(NamedTuple):
    """Result of a lookup in a HashTable: the index of each hash that is in the table, and the number stored for it."""

    indexes: ndarray
    owners: ndarray


class HashTable:
    """A lookup from hashes to integers (owners), such as the numbers of the texts that contain a hash.

    A bitmap is checked before the binary search: most hashes that are looked up are absent.

    Args:
        hashes: uint64, ascending. The bitmap uses their low bits.
        owners: integers, the owner of each hash. A hash with several owners is repeated.
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
    def from_unsorted(cls, hashes: ndarray, owners: ndarray) -> HashTable:
        """Build a table from hashes in any order and the integer stored for each. The integers of one hash keep their
        order."""
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], owners[order])

    @classmethod
    def from_values(cls, values: ndarray) -> HashTable:
        """Build a table from hashes alone, which only serves to test whether hashes are in it."""
        values = sort_unique(values)
        return cls(values, np.arange(len(values)))

    def might_contain(self, hashes: ndarray) -> ndarray:
        """Return whether each hash may be in the table, bool (N), by a look at its bitmap. There are false positives
        and no false negatives."""
        places = (hashes & self.mask).astype(np.int64)
        return (self.bitmap[places >> 3] >> (places & 7).astype(np.uint8) & 1).view(bool)

    def contains(self, hashes: ndarray) -> ndarray:
        """Return whether each hash is in the table, bool (N)."""
        is_held = self.might_contain(hashes)
        is_held[is_held] = is_in_sorted(self.hashes, hashes[is_held])
        return is_held

    def find_owners(self, hashes: ndarray) -> HashMatches:
        """Look up hashes, and return the index of each hash that is in the table with the integer stored for it. The
        indexes are ascending.

        A hash with several owners is returned once for each of them.
        """
        indexes = np.flatnonzero(self.might_contain(hashes))
        begins = np.searchsorted(self.hashes, hashes[indexes])
        counts = np.searchsorted(self.hashes, hashes[indexes], "right") - begins
        return HashMatches(np.repeat(indexes, counts), self.owners[concatenate_ranges(begins, counts)])

    def find_pairs(self, hashes: ndarray, owners: ndarray) -> tuple[ndarray, ndarray]:
        """Return the distinct pairs of a number in `owners` and a number in the table that have a hash in common.

        Args:
            owners: the owner of each of `hashes`, below 2^32.

        Returns:
            The first and the second owner of each pair, int64.
        """
        indexes, table_owners = self.find_owners(hashes)
        pairs = sort_unique(owners[indexes] << 32 | table_owners)
        return pairs >> 32, pairs & 0xFFFFFFFF


BITS_PER_HASH = 24
"""Minimum number of bits of a Bloom filter for each hash."""
PROBES = 14
"""Number of bits of a Bloom filter that are checked for a hash. The false positive rate is about 1 in 90,000: (1 -
exp(-14/24))^14."""


class BloomFilter:
    """A Bloom filter over hashes (Bloom 1970), with two hash functions as in Kirsch and Mitzenmacher 2006.

    Args:
        count: how many hashes will be added.
    """

    def __init__(self, count: int) -> None:
        self.bits = max(BITS_PER_HASH * count, 1 << 16).bit_length()
        self.table = np.zeros(1 << self.bits - 3, np.uint8)

    def add(self, hashes: ndarray) -> None:
        """Add hashes to the filter, uint64 (N). All of their 64 bits have to be random."""
        for probe in range(PROBES):
            np.bitwise_or.at(self.table, *self._locate_bits(hashes, probe))

    def might_contain(self, hashes: ndarray) -> ndarray:
        """Return whether each hash (uint64 (N)) may have been added, bool (N). There are false positives and no false
        negatives."""
        candidates = np.arange(len(hashes))
        for probe in range(PROBES):
            byte, bit = self._locate_bits(hashes[candidates], probe)
            candidates = candidates[self.table[byte] & bit != 0]
        is_possible = np.zeros(len(hashes), bool)
        is_possible[candidates] = True
        return is_possible

    def _locate_bits(self, hashes: ndarray, probe: int) -> tuple[ndarray, ndarray]:
        """Return the byte offset (int64) and the bit mask (uint8) of each hash's bit in the filter, for one hash
        function.

        Args:
            probe: number of the hash function, from 0.
        """
        step = hashes >> np.uint64(32) | np.uint64(1)
        bit = hashes + np.uint64(probe) * step & np.uint64((1 << self.bits) - 1)
        return (bit >> np.uint64(3)).astype(np.int64), np.uint8(1) << (bit & np.uint64(7)).astype(np.uint8)
