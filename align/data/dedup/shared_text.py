"""Text that many documents share: instructions, templates, preambles. It does not count where documents are compared.

Documents with a band's key in common are a group (`align.data.dedup.groups`). A shingle that half of a group of at
least `MANY` documents have is *shared*. Templates may be nested (a preamble of all rows, an instruction of some), so
that one group a document does not do: of the groups of each document, the largest of every size class (powers of two)
count. A template that more than half of a larger family has is shared in that family's group, and any other one has
groups of a lower class. Of a large group a sample is counted, which goes by what documents say and not by their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy import ndarray

from align.data.dedup.arrays import NO_HASHES, distinct, join, spans
from align.data.dedup.groups import Groups
from align.data.dedup.shingles import HASH_BITS, Shingles

MANY = 16
"""Documents from which on a group's text may be shared."""
SAMPLE = 64
"""Documents of a group that are counted."""
SHARE = 0.5
"""Of the counted documents, that have a shared shingle."""
OWN = 24
"""Shingles. Of documents that have fewer beside the text that they share, all have to be the same."""
BLOCK_GROUPS = 1 << 64 - HASH_BITS
"""Groups that are counted together."""
BLOCK_SHINGLES = 1 << 22
"""Shingles of these groups in memory."""


def find_shared(
    groups: Groups, index: ndarray, sizes: ndarray, content: ndarray, read: Callable[[ndarray], Shingles]
) -> ndarray:
    """Return the shared shingles, uint64, ascending.

    Args:
        index: the document at each place, int64 (N); members of groups are places.
        sizes: shingles of each document (N).
        content: a hash of what each document says, uint64 (N): those with the least are counted.
        read: documents (int64, ascending) → their shingles.
    """
    shared = NO_HASHES
    samples = [index[members] for members in select_samples(groups, content[index])]
    costs = np.array([sizes[documents].sum(dtype=np.int64) for documents in samples], np.int64)
    for start, end in spans(costs, BLOCK_SHINGLES, BLOCK_GROUPS):
        documents = distinct(np.concatenate(samples[start:end]))
        sets = read(documents)
        counted = [count_group(sets, np.searchsorted(documents, sample)) for sample in samples[start:end]]
        shared = distinct(join(counted, shared))
    return shared


def count_group(sets: Shingles, rows: ndarray) -> ndarray:
    """Return the shingles that at least `SHARE` of some sets have, uint64."""
    values = np.sort(np.concatenate([sets.values[sets.offsets[row] : sets.offsets[row + 1]] for row in rows]))
    need = int(np.ceil(SHARE * len(rows)))
    if need > len(values):
        return NO_HASHES
    return distinct(values[need - 1 :][values[need - 1 :] == values[: len(values) - need + 1]])


def select_samples(groups: Groups, content: ndarray) -> Iterator[ndarray]:
    """Yield the members that are counted of each group that counts: the `SAMPLE` members with the least content hashes,
    and those that say the same as the last of these.

    Args:
        content: of the document at each place.
    """
    first = groups.first
    classes = np.frexp(groups.sizes.astype(np.float64))[1]
    large = groups.sizes >= MANY
    for size_class in np.unique(classes[large]).tolist():
        chosen = np.flatnonzero(large & (classes == size_class))
        chosen = chosen[np.argsort(-groups.sizes[chosen], kind="stable")]
        largest = np.zeros(len(content), np.int64)
        for group in chosen.tolist():
            size = int(groups.sizes[group])
            members = groups.members[first[group] : first[group] + size]
            if (largest[members] <= size).any():
                largest[members] = np.maximum(largest[members], size)
                least = content[members]
                yield members if size <= SAMPLE else members[least <= np.partition(least, SAMPLE - 1)[SAMPLE - 1]]
