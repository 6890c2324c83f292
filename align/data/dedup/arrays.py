"""What NumPy has no function for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def spans(costs: np.ndarray, budget: int, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive spans `(from, to)` of at most `most` items that cost at most `budget` together, or of one item."""
    ends, at = np.cumsum(costs, dtype=np.int64), 0
    while at < len(costs):
        limit = (ends[at - 1] if at else 0) + budget
        end = min(max(int(np.searchsorted(ends, limit, "right")), at + 1), at + most, len(costs))
        yield at, end
        at = end


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`starts[i], starts[i] + 1, …`, `counts[i]` numbers of each, one after another (int64)."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def distinct(values: np.ndarray) -> np.ndarray:
    """The values in ascending order, each one once. `np.unique` hashes, which is slower."""
    ranked = np.sort(values)
    once = np.ones(len(ranked), bool)
    np.not_equal(ranked[1:], ranked[:-1], out=once[1:])
    return ranked[once]


def held(ranked: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Which of the values asked for are among those in ascending order (bool)."""
    if not len(ranked):
        return np.zeros(len(asked), bool)
    return ranked[np.minimum(np.searchsorted(ranked, asked), len(ranked) - 1)] == asked


def components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest number that each of `count` is linked to, directly or by way of others (int64).

    Args:
        a, b: numbers that are linked, pair by pair.

    Source: hooking and pointer jumping, Shiloach and Vishkin 1982, "An O(log n) parallel connectivity algorithm".
    """
    root = np.arange(count)
    while len(a):
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(root, high, low)
        while not np.array_equal(root, above := root[root]):
            root = above
        a, b = root[a], root[b]
        apart = a != b
        a, b = a[apart], b[apart]
    return root


def shared(
    a: np.ndarray, starts_a: np.ndarray, counts_a: np.ndarray,
    b: np.ndarray, starts_b: np.ndarray, counts_b: np.ndarray, bits: int,
) -> np.ndarray:  # fmt: skip
    """How many values two slices, of `a` and of `b`, have in common, for each pair of slices (int64).

    Values are integers under 2^bits, each one once in a slice; there are at most 2^(64 - bits) pairs.
    """
    pair = np.arange(len(starts_a), dtype=np.uint64) << np.uint64(bits)
    both = np.concatenate([
        a[ranges(starts_a, counts_a)].astype(np.uint64, copy=False) | np.repeat(pair, counts_a),
        b[ranges(starts_b, counts_b)].astype(np.uint64, copy=False) | np.repeat(pair, counts_b),
    ])  # fmt: skip
    both.sort()
    twice = both[1:][both[1:] == both[:-1]] >> np.uint64(bits)  # what both slices hold stands there twice
    return np.bincount(twice.astype(np.int64), minlength=len(pair))
