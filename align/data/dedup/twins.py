"""Near-duplicates: which documents are dropped, and for which kept one.

Documents are taken in order of preference. One is dropped if and only if an earlier document, which is *kept*, shares
a band's key with it and is at least as similar as the threshold. So a chain a ~ b ~ c loses b to a, and keeps c where c
is no twin of a: connected components would drop c, of which nothing alike is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from align.data.dedup.arrays import components, distinct, held, spans
from align.data.dedup.greedy import Block, Greedy, Marked
from align.data.dedup.groups import Groups, Memberships, sharing
from align.data.dedup.jaccard import jaccard
from align.data.dedup.patterns import Patterns, nothing, together
from align.data.dedup.prefixes import Rarity
from align.data.dedup.shingles import Shingles
from align.data.dedup.sketches import Sketches
from align.data.dedup.words import BLOCK_DOCUMENTS

BLOCK = 1 << 12
"""Documents that are decided together."""
BLOCK_SHINGLES = 1 << 22
"""That are in memory together."""
SKETCHED = 8
"""Groups with more members have sketches: to make one costs as much as some comparisons."""
LARGE = 64
"""Groups with more members are compared by rare shingles."""
SAMPLE, COMMON = 32, 2
"""Members of a large group that tell which shingles are rare; and how many of them have one that is common."""
HUGE = 1 << 25
"""Shingles that are read to compare each with each of a group, from which on it tells which ones are common."""

Sets = Callable[[np.ndarray], Shingles]


@dataclass(frozen=True)
class Twins:
    """One row a dropped document, in order of preference."""

    dropped: np.ndarray
    """int64: which document."""
    kept: np.ndarray
    """int64: the first kept document, in order of preference, that it is a twin of."""
    jaccard: np.ndarray
    """float64: of the two."""

    def clusters(self) -> tuple[np.ndarray, np.ndarray]:
        """The kept documents that have twins, and the size of each one's cluster (itself included), largest first."""
        kept, sizes = np.unique(self.kept, return_counts=True)
        order = np.argsort(-sizes, kind="stable")
        return kept[order], sizes[order] + 1


def twins(
    order: np.ndarray,
    sizes: np.ndarray,
    column: Callable[[int], np.ndarray],
    read: Sets,
    threshold: float = 0.7,
    bands: int = 32,
    sources: np.ndarray | None = None,
    across: bool = False,
) -> Twins:
    """The documents to drop, of N.

    Args:
        order: int64 (N): rank of preference of each document; the lower one survives, of equal ranks the first.
        sizes: integers (N): how many shingles each document has. One that has none has no keys, and is kept.
        column: band → uint64 (N), the keys of all documents in that band (`band_keys`). Asked once a band.
        read: indexes (int64, ascending) → the shingles of these documents.
        threshold: the least Jaccard similarity of twins, in (0, 1], exact on hashed shingles (`Shingles`).
        sources: integers (N): with it, only documents of the same source are twins; with `across`, only those of two.
    """
    documents = Documents(np.argsort(order, kind="stable"), sizes, read)
    groups = sharing(documents.places(), sizes > 0, column, bands)
    memberships, large = groups.by_document(), groups.sizes > LARGE
    rarity = Rarity(documents.common(groups))
    for _, sets in documents.sets(groups.sampled(LARGE, SAMPLE)):
        rarity.add(sets)

    def similar(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
        a, b = documents.index[earlier], documents.index[later]
        asked = np.minimum(sizes[a], sizes[b]) / np.maximum(sizes[a], sizes[b]) >= threshold  # J is at most this
        if sources is not None:
            asked &= (sources[a] != sources[b]) == across
        asked[asked] = sketches.may(earlier[asked], later[asked], sizes[a[asked]] + sizes[b[asked]], threshold)
        found = np.zeros(len(a))
        found[asked] = documents.similarities(earlier[asked], later[asked])
        enough = np.flatnonzero(found >= threshold)
        apart = ~memberships.meet(earlier[enough], later[enough])  # a rare shingle in common, but no key
        found[enough[apart]] = 0
        return found

    sketches = Sketches(memberships.in_any(groups.sizes > min(SKETCHED, LARGE)))
    del groups  # as large as the memberships
    family = families(memberships, large) if len(rarity.common) else np.zeros(0, np.int64)
    of_source = None if sources is None else sources[documents.index]
    greedy = Greedy(similar, threshold, None if sources is None else across)
    for places, group in memberships.blocks(sizes[documents.index], 2 * BLOCK_SHINGLES, BLOCK):
        greedy.decide(compared(places, group, large, documents, rarity, sketches, threshold, family, of_source))
    kept, dropped, similarity = greedy.found()
    return Twins(documents.index[dropped], documents.index[kept], similarity)


def compared(
    places: np.ndarray, group: np.ndarray, large: np.ndarray, documents: Documents, rarity: Rarity,
    sketches: Sketches, threshold: float, family: np.ndarray, source: np.ndarray | None,
) -> Block:  # fmt: skip
    """The marks and patterns (`align.data.dedup.greedy`) of documents at `places`, each there once for every `group`
    of its own. Adds their sketches.

    Args:
        family: of each group (`families`); empty where no shingle is common.
        source: of each place.
    """
    of_large = large[group]
    marks, owners = [group[~of_large].astype(np.uint64)], [places[~of_large]]
    made, keys, holders = nothing(), [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)]
    inside, first = np.unique(places[of_large], return_index=True)
    of_inside = family[group[of_large][first]] if len(family) else family
    for some, sets in documents.sets(distinct(places[held(sketches.places, places)])):
        sketches.add(some, sets)
        some, sets = some[chosen := held(inside, some)], sets.where(chosen)
        mark, many = rarity.marks(sets, threshold)
        marks.append(mark)
        owners.append(np.repeat(some, many))
        if len(family):
            of = np.zeros(len(some), np.int64) if source is None else source[some].astype(np.int64)
            found, able, key = Patterns.of(sets, rarity.common, threshold, of_inside[np.searchsorted(inside, some)], of)
            made = together(made, found)
            keys.append(key)
            holders.append(some[able])
    patterned = Marked.of(np.concatenate(keys), np.concatenate(holders))
    return Block(Marked.of(np.concatenate(marks), np.concatenate(owners)), patterned, made)


def families(memberships: Memberships, large: np.ndarray) -> np.ndarray:
    """A label of each group (int64): the same for large ones that have a member in common, directly or by others."""
    document = np.repeat(np.arange(len(memberships.documents)), np.diff(memberships.offsets))
    of_large = large[memberships.groups]
    document, group = document[of_large], memberships.groups[of_large]
    same = document[1:] == document[:-1]
    return components(len(large), group[:-1][same].astype(np.int64), group[1:][same].astype(np.int64))


@dataclass(frozen=True)
class Documents:
    """Documents by their places in the order of preference."""

    index: np.ndarray
    """int64 (N): which document is at each place."""
    sizes: np.ndarray
    """By document."""
    read: Sets

    def places(self) -> np.ndarray:
        """int32 (N): the place of each document."""
        place = np.empty(len(self.index), np.int32)
        place[self.index] = np.arange(len(self.index), dtype=np.int32)
        return place

    def sets(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, Shingles]]:
        """The shingles of the documents at these places, with their places, a bounded number at a time."""
        places = places[np.argsort(self.index[places])]
        for at, end in spans(self.sizes[self.index[places]], BLOCK_SHINGLES, BLOCK_DOCUMENTS):
            yield places[at:end], self.read(self.index[places[at:end]])

    def common(self, groups: Groups) -> np.ndarray:
        """Shingles that many members of a huge group have (uint64, ascending)."""
        found = [np.zeros(0, np.uint64)]
        for places in groups.telling(self.sizes[self.index], HUGE, SAMPLE):
            values = np.concatenate([sets.values for _, sets in self.sets(places)])
            once, counts = np.unique(values, return_counts=True)
            found.append(once[counts >= COMMON])
        return distinct(np.concatenate(found))

    def similarities(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """float64 (pairs): the Jaccard similarity of the documents at the places `a` and `b`."""
        a, b = self.index[a], self.index[b]
        found = np.zeros(len(a))
        for at, end in spans(self.sizes[a].astype(np.int64) + self.sizes[b], BLOCK_SHINGLES, len(a)):
            documents = distinct(np.concatenate([a[at:end], b[at:end]]))
            sets = self.read(documents)
            found[at:end] = jaccard(
                sets, np.searchsorted(documents, a[at:end]), sets, np.searchsorted(documents, b[at:end])
            )
        return found
