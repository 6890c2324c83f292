"""A set of hashes in a few bits each, which never misses one that it holds."""

from __future__ import annotations

import numpy as np

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

    def add(self, hashes: np.ndarray) -> None:
        """Args: hashes: uint64 (N), of which every bit counts."""
        for probe in range(PROBES):
            at, bit = self._place(hashes, probe)
            np.bitwise_or.at(self.table, at, bit)

    def maybe(self, hashes: np.ndarray) -> np.ndarray:
        """Which of these hashes (uint64 (N)) were added, bool (N): all of those, and few others."""
        left = np.arange(len(hashes))
        for probe in range(PROBES):
            at, bit = self._place(hashes[left], probe)
            left = left[self.table[at] & bit != 0]
        found = np.zeros(len(hashes), bool)
        found[left] = True
        return found

    def _place(self, hashes: np.ndarray, probe: int) -> tuple[np.ndarray, np.ndarray]:
        """The byte that a hash is looked for in (int64), and its bit there (uint8)."""
        step = hashes >> np.uint64(32) | np.uint64(1)
        place = hashes + np.uint64(probe) * step & np.uint64((1 << self.bits) - 1)
        return (place >> np.uint64(3)).astype(np.int64), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)
