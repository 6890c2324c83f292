"""The rarest shingles of documents, by which alike ones among very many meet."""

from __future__ import annotations

import numpy as np

from align.data.dedup.arrays import held
from align.data.dedup.shingles import HASH_BITS, Shingles

BUCKETS = 1 << 20
MARK = np.uint64(1 << 63)
"""Is in every mark that is a shingle, and in none that is a group."""


class Rarity:
    """How common shingles are, as far as a sample tells.

    Marks are right by any fixed order of shingles. Where the rare ones come first, few documents have one in common.

    Args:
        common: shingles that are no marks, ascending; they come last.
    """

    def __init__(self, common: np.ndarray | None = None) -> None:
        self.counts, self.common = np.zeros(BUCKETS, np.int64), np.zeros(0, np.uint64) if common is None else common

    def add(self, sample: Shingles) -> None:
        self.counts += np.bincount((sample.values & np.uint64(BUCKETS - 1)).astype(np.int64), minlength=BUCKETS)

    def marks(self, sets: Shingles, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Of a set of n, its n - ⌈threshold · n⌉ + 1 rarest: sets as similar as the threshold have one in common. Those
        that are common are left out.

        Args:
            sets: at most 1,024.

        Returns:
            The marks (uint64), set after set, and how many each set has (int64).
        """
        sizes = sets.sizes
        owner = np.repeat(np.arange(len(sets), dtype=np.uint64), sizes)
        # 10 bits for the set, 9 for how common the shingle is, and 45 of its hash.
        common = np.minimum(self.counts[(sets.values & np.uint64(BUCKETS - 1)).astype(np.int64)], 510).astype(np.uint64)
        if len(self.common):
            common[held(self.common, sets.values)] = 511
        ranked = owner << np.uint64(HASH_BITS) | common << np.uint64(45) | sets.values >> np.uint64(HASH_BITS - 45)
        ranked.sort()
        least = np.ceil(threshold * sizes * (1 - 1e-12)).astype(np.int64)  # rounding must not ask for one more
        many = np.where(sizes > 0, np.minimum(sizes - least + 1, sizes), 0)
        first = np.arange(len(ranked)) - np.repeat(sets.offsets[:-1], sizes) < np.repeat(many, sizes)
        if len(self.common):
            first &= ranked >> np.uint64(45) & np.uint64(511) != 511
            many = np.diff(np.append(0, np.cumsum(first))[sets.offsets])
        return ranked[first] & np.uint64((1 << HASH_BITS) - 1) | MARK, many
