"""Owners by hashes: which texts have a run of words, a mark or a whole question."""

from __future__ import annotations

import numpy as np

from align.data.dedup.arrays import distinct, held, ranges


class HashTable:
    """Owners by hashes, with a bitmap in front: most hashes that are looked up are absent, and need no search.

    Args:
        hashes: uint64, ascending, of which the low bits count.
        owners: integers, the owner of each; a hash may have several.
    """

    def __init__(self, hashes: np.ndarray, owners: np.ndarray) -> None:
        self.hashes = hashes
        self.owners = owners
        bits = min(max(16 * len(hashes), 1 << 12).bit_length(), 26)
        self.mask = np.uint64((1 << bits) - 1)
        bitmap = np.zeros(1 << bits, bool)
        bitmap[(hashes & self.mask).astype(np.int64)] = True
        self.bitmap = np.packbits(bitmap, bitorder="little")

    @classmethod
    def sort(cls, hashes: np.ndarray, owners: np.ndarray) -> HashTable:
        """Return a table of hashes in any order. Owners of one hash stay in order."""
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], owners[order])

    def may_hold(self, hashes: np.ndarray) -> np.ndarray:
        """Return which hashes may be here, bool (N): all that are, and few others."""
        places = (hashes & self.mask).astype(np.int64)
        return (self.bitmap[places >> 3] >> (places & 7).astype(np.uint8) & 1).view(bool)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Return which hashes are here, bool (N)."""
        inside = self.may_hold(hashes)
        inside[inside] = held(self.hashes, hashes[inside])
        return inside

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return places in `hashes`, ascending, and the owners of each of these here."""
        places = np.flatnonzero(self.may_hold(hashes))
        begins = np.searchsorted(self.hashes, hashes[places])
        counts = np.searchsorted(self.hashes, hashes[places], "right") - begins
        return np.repeat(places, counts), self.owners[ranges(begins, counts)]

    def find_pairs(self, hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return owners of these hashes, and owners of equal ones here; each pair once, int64 below 2^32."""
        places, here = self.find(hashes)
        pairs = distinct(owners[places] << 32 | here)
        return pairs >> 32, pairs & 0xFFFFFFFF
