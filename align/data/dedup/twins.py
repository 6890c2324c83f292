"""Near-duplicates: which documents are dropped, and for which kept one.

Documents are taken in order of preference. One is dropped if and only if an earlier document, which is *kept*, shares
a band's key with it and is its twin. So a chain a ~ b ~ c loses b to a, and keeps c where c is no twin of a: connected
components would drop c, of which nothing alike is left.

Two documents are **twins** if the Jaccard similarity of their shingles reaches the threshold, and their numbers and
operators are the same (`align.data.dedup.numbers`), and this holds: where more than half of the shingles that they
have in common are text that many documents share (`align.data.dedup.shared_text`), that text does not count. The
similarity of the rest has to reach the threshold too; if one of them has fewer than `OWN` shingles beside it, their
sets have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from align.data.dedup.arrays import distinct, held, spans
from align.data.dedup.greedy import Greedy, Marked
from align.data.dedup.groups import sharing
from align.data.dedup.jaccard import count_common
from align.data.dedup.prefixes import Rarity
from align.data.dedup.shared_text import OWN, find_shared
from align.data.dedup.shingles import Shingles
from align.data.dedup.sketches import Sketches
from align.data.dedup.words import BLOCK_DOCUMENTS, ODD, mixed

BLOCK = 1 << 12
"""Documents that are decided together."""
BLOCK_SHINGLES = 1 << 22
"""That are in memory together."""
SKETCHED = 8
"""Groups with more members have sketches: to make one costs as much as some comparisons."""
LARGE = 64
"""Groups with more members are compared by rare shingles."""
SAMPLE = 32
"""Members of a large group that tell which shingles are rare."""
WHOLE = np.uint64(1 << 62)
"""Is in every mark that is a hash of a whole set, and in none that is a group."""

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
    numbers: np.ndarray | None = None,
    content: np.ndarray | None = None,
    shared: np.ndarray | None = None,
) -> Twins:
    """Return the documents to drop, of N.

    Args:
        order: int64 (N): rank of preference of each document; the lower one survives, of equal ranks the first.
        sizes: integers (N): how many shingles each document has. One that has none has no keys, and is kept.
        column: band → uint64 (N), the keys of all documents in that band (`band_keys`). Asked once a band.
        read: indexes (int64, ascending) → the shingles of these documents.
        threshold: the least Jaccard similarity of twins, in (0, 1], exact on hashed shingles (`Shingles`).
        sources: integers (N): with it, only documents of the same source are twins; with `across`, only those of two.
        numbers: uint64 (N): hashes of numbers and operators (`number_hashes`); None if these do not count.
        content: uint64 (N): hashes of documents, by which the shared text is found (`find_shared`).
        shared: the shared shingles, ascending, where they are known. Without it and `content`, no text is shared.
    """
    documents = Documents(np.argsort(order, kind="stable"), sizes, read)
    groups = sharing(documents.places(), sizes > 0, column, bands)
    if shared is None:
        shared = np.zeros(0, np.uint64)
        if content is not None:
            shared = find_shared(groups, documents.index, sizes, content, read)
    memberships, large = groups.by_document(), groups.sizes > LARGE
    rarity = Rarity(shared)
    for _, sets in documents.sets(groups.sampled(LARGE, SAMPLE)):
        rarity.add(sets)

    def similar(earlier: np.ndarray, later: np.ndarray) -> np.ndarray:
        a, b = documents.index[earlier], documents.index[later]
        asked = np.minimum(sizes[a], sizes[b]) / np.maximum(sizes[a], sizes[b]) >= threshold  # J is at most this
        if sources is not None:
            asked &= (sources[a] != sources[b]) == across
        if numbers is not None:
            asked &= numbers[a] == numbers[b]
        asked[asked] = sketches.may(earlier[asked], later[asked], sizes[a[asked]] + sizes[b[asked]], threshold)
        found = np.zeros(len(a))
        found[asked] = documents.similarities(earlier[asked], later[asked], threshold, shared)
        enough = np.flatnonzero(found >= threshold)
        apart = ~memberships.meet(earlier[enough], later[enough])  # a rare shingle in common, but no key
        found[enough[apart]] = 0
        return found

    sketches = Sketches(memberships.in_any(groups.sizes > min(SKETCHED, LARGE)))
    del groups  # as large as the memberships
    greedy = Greedy(similar, threshold)
    for places, group in memberships.blocks(sizes[documents.index], 2 * BLOCK_SHINGLES, BLOCK):
        greedy.decide(mark_documents(places, group, large, documents, rarity, sketches, threshold))
    kept, dropped, similarity = greedy.found()
    return Twins(documents.index[dropped], documents.index[kept], similarity)


def mark_documents(
    places: np.ndarray,
    group: np.ndarray,
    large: np.ndarray,
    documents: Documents,
    rarity: Rarity,
    sketches: Sketches,
    threshold: float,
) -> Marked:
    """Return the marks (`align.data.dedup.greedy`) of documents at `places`, each there once for every `group` of its
    own, and add their sketches.

    In large groups, twins have a rare shingle in common that is not shared text, or the same set.
    """
    of_large = large[group]
    marks, owners = [group[~of_large].astype(np.uint64)], [places[~of_large]]
    inside = distinct(places[of_large])
    for some, sets in documents.sets(distinct(places[held(sketches.places, places)])):
        sketches.add(some, sets)
        chosen = held(inside, some)
        some, sets = some[chosen], sets.where(chosen)
        mark, many = rarity.marks(sets, threshold)
        marks.append(mark)
        owners.append(np.repeat(some, many))
        if len(rarity.common):
            marks.append(hash_sets(sets))
            owners.append(some)
    return Marked.of(np.concatenate(marks), np.concatenate(owners))


def hash_sets(sets: Shingles) -> np.ndarray:
    """Return a mark of each whole set, uint64 (N); no set is empty."""
    if not len(sets):
        return np.zeros(0, np.uint64)
    sums = np.add.reduceat(mixed(sets.values * ODD + ODD), sets.offsets[:-1])
    return mixed(sums) >> np.uint64(2) | WHOLE


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

    def similarities(self, a: np.ndarray, b: np.ndarray, threshold: float, shared: np.ndarray) -> np.ndarray:
        """Return the Jaccard similarity of the documents at the places `a` and `b`, float64 (pairs); 0 for pairs that
        are alike by shared text only."""
        a, b = self.index[a], self.index[b]
        found = np.zeros(len(a))
        for at, end in spans(self.sizes[a].astype(np.int64) + self.sizes[b], BLOCK_SHINGLES, len(a)):
            documents = distinct(np.concatenate([a[at:end], b[at:end]]))
            one, other = (np.searchsorted(documents, side[at:end]) for side in (a, b))
            found[at:end] = compare_sets(self.read(documents), one, other, threshold, shared)
        return found


def compare_sets(sets: Shingles, a: np.ndarray, b: np.ndarray, threshold: float, shared: np.ndarray) -> np.ndarray:
    """Return the Jaccard similarity of the sets `a` and `b`, pair by pair, float64; 0 for pairs that reach the
    threshold by shared text only.

    Args:
        shared: shingles, ascending.
    """
    common = count_common(sets, a, sets, b)
    union = sets.sizes[a] + sets.sizes[b] - common
    similarity = common / np.maximum(union, 1)
    pairs = np.flatnonzero((similarity >= threshold) & (common < union))  # equal sets are twins
    if not len(shared) or not len(pairs):
        return similarity
    a, b, common, union = a[pairs], b[pairs], common[pairs], union[pairs]
    least = np.minimum(sets.sizes[a], sets.sizes[b])
    chosen = np.zeros(len(sets), bool)
    chosen[a] = chosen[b] = True
    of_shared = sets.where(chosen).only(shared)
    place = np.cumsum(chosen) - 1
    both = count_common(of_shared, place[a], of_shared, place[b])
    enough = ((common - both) >= threshold * (union - both)) & (least - both >= OWN)
    similarity[pairs[(2 * both > common) & ~enough]] = 0
    return similarity
