"""Exact duplicates: documents with the digest of an earlier one."""

from __future__ import annotations

import numpy as np

from align.data.dedup.twins import Twins


def exact(digests: np.ndarray, order: np.ndarray, sources: np.ndarray | None = None, across: bool = False) -> Twins:
    """The documents to drop, of N; each names the first one, in order of preference, that it is equal to.

    Args:
        digests: N of 16 bytes (`normalised_digests`).
        order: int64 (N): rank of preference of each document; the lower one survives, of equal ranks the first.
        sources: integers (N): with it, only documents of one source are duplicates; with `across`, only those of two.
    """
    halves = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)
    within = sources if sources is not None and not across else np.zeros(len(order), np.int64)
    ranked = np.lexsort((order, within, halves[:, 1], halves[:, 0]))  # stable: of equal ranks by index
    first = np.ones(len(ranked), bool)
    keys = (halves[:, 0], halves[:, 1], within)
    first[1:] = np.logical_or.reduce([key[ranked[1:]] != key[ranked[:-1]] for key in keys])
    kept = ranked[first][np.cumsum(first) - 1]
    gone = ~first
    if sources is not None and across:
        gone &= sources[ranked] != sources[kept]
    dropped, kept = ranked[gone], kept[gone]
    by_preference = np.lexsort((dropped, order[dropped]))
    return Twins(dropped[by_preference], kept[by_preference], np.ones(len(dropped)))
