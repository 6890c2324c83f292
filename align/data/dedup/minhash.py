"""MinHash signatures in bands: documents that are much alike have a band's key in common."""

from __future__ import annotations

import numpy as np

from align.data.dedup.shingles import HASH_BITS, Shingles
from align.data.dedup.words import ODD, mixed

BANDS, ROWS = 32, 4
BLOCK = 1 << 16
"""Shingles that are hashed at once, so that they stay in a core's cache."""


def band_keys(shingles: Shingles, bands: int = BANDS, rows: int = ROWS, seed: int = 1) -> np.ndarray:
    """Keys of which two documents have one in common with probability 1 - (1 - J^rows)^bands.

    J is the Jaccard similarity of their sets. The signature has `bands * rows` values: the least of a·x modulo 2^32
    over a document's shingles x, each by an odd a of its own. (x is a hash already, and needs no term.) A key hashes
    `rows` of them.

    Returns:
        uint64 (N, bands). The row of a document without shingles is 0 and is no key: leave such documents out
        (`shingles.sizes == 0`).

    Source: Broder 1997; banding by Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.
    """
    numbers = mixed(np.arange(1, bands * rows + 1, dtype=np.uint64) * ODD + np.uint64(seed))
    factors = (numbers >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    keys = np.zeros((len(shingles), bands), np.uint64)
    filled = np.flatnonzero(shingles.sizes)
    starts, ends = shingles.offsets[filled], shingles.offsets[filled + 1]
    at = 0
    while at < len(filled):
        end = max(int(np.searchsorted(ends, starts[at] + BLOCK, "right")), at + 1)
        values = shingles.values[starts[at] : ends[end - 1]]
        keys[filled[at:end]] = banded(signatures(values, starts[at:end] - starts[at], factors), bands)
        at = end
    return keys


def signatures(values: np.ndarray, starts: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """uint32 (hash functions, documents): the least value of each function over each document."""
    x = (values >> np.uint64(HASH_BITS - 32)).astype(np.uint32)
    found, room = np.empty((len(factors), len(starts)), np.uint32), np.empty_like(x)
    for row, factor in enumerate(factors):
        np.multiply(x, factor, out=room)
        np.minimum.reduceat(room, starts, out=found[row])
    return found


def banded(signatures: np.ndarray, bands: int) -> np.ndarray:
    """uint64 (documents, bands): the hash of each band's rows."""
    of_band = signatures.reshape(bands, -1, signatures.shape[1])
    keys = np.zeros((bands, signatures.shape[1]), np.uint64)
    for row in range(of_band.shape[1]):
        keys = mixed(keys * ODD + of_band[:, row] + np.uint64(1))
    return keys.T
