"""Sketches of sets that tell of most pairs, by some nanoseconds of work, that they cannot be alike.

Source: bitmap filter, Sandes, Teodoro and Melo 2020, "Bitmap filter: speeding up exact set similarity joins with
bitwise operations".
"""

from __future__ import annotations

import numpy as np

from align.data.dedup.shingles import Shingles

BITS = 512
AT_ONCE = 1 << 14
"""Pairs that are looked at together, so that they stay in a core's cache."""


class Sketches:
    """Of each document as many bits, each the parity of the number of its shingles that belong to it.

    Args:
        places: of the documents that will have one, ascending.
    """

    def __init__(self, places: np.ndarray) -> None:
        self.places, self.bits = places, np.zeros((len(places), BITS // 64), np.uint64)

    def add(self, places: np.ndarray, sets: Shingles) -> None:
        """Args: sets: at most 1,024, of the documents at these places."""
        owner = np.repeat(np.arange(len(sets)) * BITS, sets.sizes)
        odd = np.bincount(owner + (sets.values & np.uint64(BITS - 1)).astype(np.int64), minlength=len(sets) * BITS) & 1
        found = np.packbits(odd.astype(bool).reshape(len(sets), BITS), axis=1)
        self.bits[np.searchsorted(self.places, places)] = found.view(np.uint64)

    def may(self, a: np.ndarray, b: np.ndarray, sizes: np.ndarray, threshold: float) -> np.ndarray:
        """Whether the documents at places `a` and `b` may be as similar as the threshold, pair by pair (bool).

        Two sets differ by at least as many shingles as their sketches have different bits.

        Args:
            sizes: of both sets of each pair together.
        """
        found = np.ones(len(a), bool)
        if not len(self.places):
            return found
        most = sizes * ((1 - threshold) / (1 + threshold)) * (1 + 1e-9)  # J of sets that differ by more is below
        for at in range(0, len(a), AT_ONCE):
            here = slice(at, at + AT_ONCE)
            one, other = (np.searchsorted(self.places, places[here]) for places in (a, b))
            one, other = (np.minimum(row, len(self.places) - 1) for row in (one, other))
            known = (self.places[one] == a[here]) & (self.places[other] == b[here])
            apart = np.bitwise_count(self.bits[one] ^ self.bits[other]).sum(1, dtype=np.int64)
            found[here] = ~known | (apart <= most[here])
        return found
