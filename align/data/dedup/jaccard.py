"""The Jaccard similarity of many pairs of sets at once."""

from __future__ import annotations

import numpy as np

from align.data.dedup.arrays import shared, spans
from align.data.dedup.shingles import HASH_BITS, Shingles

BLOCK_PAIRS = 1 << 64 - HASH_BITS
BLOCK_VALUES = 1 << 17
"""Of both sides of the pairs that are compared at once: they stay in a core's cache."""


def jaccard(a: Shingles, ia: np.ndarray, b: Shingles, ib: np.ndarray) -> np.ndarray:
    """|A ∩ B| / |A ∪ B| of the sets `ia[p]` of `a` and `ib[p]` of `b`, for each pair p.

    Returns:
        float64 (pairs); 0 where both sets are empty.
    """
    common = count_common(a, ia, b, ib)
    return common / np.maximum(a.sizes[ia] + b.sizes[ib] - common, 1)


def count_common(a: Shingles, ia: np.ndarray, b: Shingles, ib: np.ndarray) -> np.ndarray:
    """Return |A ∩ B| of the sets `ia[p]` of `a` and `ib[p]` of `b`, for each pair p, int64."""
    sizes_a, sizes_b = a.sizes[ia], b.sizes[ib]
    starts_a, starts_b = a.offsets[ia], b.offsets[ib]
    common = np.zeros(len(sizes_a), np.int64)
    for at, end in spans(sizes_a + sizes_b, BLOCK_VALUES, BLOCK_PAIRS):
        part = slice(at, end)
        common[part] = shared(
            a.values, starts_a[part], sizes_a[part], b.values, starts_b[part], sizes_b[part], HASH_BITS
        )
    return common
