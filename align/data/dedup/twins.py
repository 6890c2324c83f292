"""Duplicates: which documents are dropped, and for which kept one. Exact ones have the digest of an earlier one.

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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from align.data.dedup.arrays import NO_HASHES, NO_NUMBERS, distinct, held, is_new, join_columns, ranges, spans
from align.data.dedup.groups import Memberships, sharing
from align.data.dedup.shared_text import OWN, find_shared
from align.data.dedup.shingles import Rarity, Shingles, count_common
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

Sets = Callable[[ndarray], Shingles]


@dataclass(frozen=True)
class Twins:
    """One row a dropped document, in order of preference."""

    dropped: ndarray
    """int64: which document."""
    kept: ndarray
    """int64: the first kept document, in order of preference, that it is a twin of."""
    jaccard: ndarray
    """float64: of the two."""

    def clusters(self) -> tuple[ndarray, ndarray]:
        """Return the kept documents that have twins, and the size of each one's cluster (itself included), largest
        first."""
        kept, sizes = np.unique(self.kept, return_counts=True)
        order = np.argsort(-sizes, kind="stable")
        return kept[order], sizes[order] + 1


def exact(digests: ndarray, order: ndarray, sources: ndarray | None = None, across: bool = False) -> Twins:
    """Return the documents to drop, of N; each names the first one, in order of preference, that it is equal to.

    Args:
        digests: N of 16 bytes (`normalised_digests`).
        order, sources, across: as for `twins`; only equal documents are duplicates here.
    """
    halves = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)
    within = sources if sources is not None and not across else np.zeros(len(order), np.int64)
    ranked = np.lexsort((order, within, halves[:, 1], halves[:, 0]))  # stable: of equal ranks by index
    first = is_new(*(key[ranked] for key in (halves[:, 0], halves[:, 1], within)))
    kept = ranked[first][np.cumsum(first) - 1]
    gone = ~first
    if sources is not None and across:
        gone &= sources[ranked] != sources[kept]
    dropped, kept = ranked[gone], kept[gone]
    by_preference = np.lexsort((dropped, order[dropped]))
    return Twins(dropped[by_preference], kept[by_preference], np.ones(len(dropped)))


def twins(
    order: ndarray,
    sizes: ndarray,
    column: Callable[[int], ndarray],
    read: Sets,
    threshold: float = 0.7,
    bands: int = 32,
    sources: ndarray | None = None,
    across: bool = False,
    numbers: ndarray | None = None,
    content: ndarray | None = None,
    shared: ndarray | None = None,
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
    place = np.empty(len(order), np.int32)
    place[documents.index] = np.arange(len(order), dtype=np.int32)
    groups = sharing(place, sizes > 0, column, bands)
    if shared is None:
        shared = NO_HASHES if content is None else find_shared(groups, documents.index, sizes, content, read)
    memberships = Memberships.of(groups)
    large = groups.sizes > LARGE
    rarity = Rarity(shared)
    for _, sets in documents.sets(groups.sampled(LARGE, SAMPLE)):
        rarity.add(sets)

    def similar(earlier: ndarray, later: ndarray) -> ndarray:
        a, b = documents.index[earlier], documents.index[later]
        asked = np.minimum(sizes[a], sizes[b]) / np.maximum(sizes[a], sizes[b]) >= threshold  # J is at most this
        if sources is not None:
            asked &= (sources[a] != sources[b]) == across
        if numbers is not None:
            asked &= numbers[a] == numbers[b]
        asked[asked] = sketches.may(earlier[asked], later[asked], sizes[a[asked]] + sizes[b[asked]], threshold)
        found = np.zeros(len(a))
        found[asked] = documents.similarities(a[asked], b[asked], threshold, shared)
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
    places: ndarray,
    group: ndarray,
    large: ndarray,
    documents: Documents,
    rarity: Rarity,
    sketches: Sketches,
    threshold: float,
) -> Marked:
    """Return the marks of documents at `places`, each there once for every `group` of its own, and add their sketches.

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


def hash_sets(sets: Shingles) -> ndarray:
    """Return a mark of each whole set, uint64 (N); no set is empty."""
    if not len(sets):
        return NO_HASHES
    sums = np.add.reduceat(mixed(sets.values * ODD + ODD), sets.offsets[:-1])
    return mixed(sums) >> np.uint64(2) | WHOLE


@dataclass(frozen=True)
class Documents:
    """Documents by their places in the order of preference."""

    index: ndarray
    """int64 (N): which document is at each place."""
    sizes: ndarray
    """By document."""
    read: Sets

    def sets(self, places: ndarray) -> Iterator[tuple[ndarray, Shingles]]:
        """Yield the shingles of the documents at these places, with their places, a bounded number at a time."""
        places = places[np.argsort(self.index[places])]
        for at, end in spans(self.sizes[self.index[places]], BLOCK_SHINGLES, BLOCK_DOCUMENTS):
            yield places[at:end], self.read(self.index[places[at:end]])

    def similarities(self, a: ndarray, b: ndarray, threshold: float, shared: ndarray) -> ndarray:
        """Return the Jaccard similarity of the documents `a` and `b`, float64 (pairs); 0 for pairs that are alike by
        shared text only."""
        found = np.zeros(len(a))
        for at, end in spans(self.sizes[a].astype(np.int64) + self.sizes[b], BLOCK_SHINGLES, len(a)):
            documents = distinct(np.append(a[at:end], b[at:end]))
            one, other = (np.searchsorted(documents, side[at:end]) for side in (a, b))
            found[at:end] = compare_sets(self.read(documents), one, other, threshold, shared)
        return found


def compare_sets(sets: Shingles, a: ndarray, b: ndarray, threshold: float, shared: ndarray) -> ndarray:
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


# --- The walk over documents in order of preference, which keeps or drops each of them.
#
# Two documents are compared only if a *mark* of theirs is the same. Marks of a document are the groups that it is in.
# In a large group (of texts from one template, say) too many pairs would be compared, and hardly any are alike. There,
# marks are the document's rarest shingles, as many as that two sets without a common one are below the threshold, but
# for those of shared text, and one mark of the whole set.
#
# Source: prefix filtering, Bayardo, Ma and Srikant 2007, "Scaling up all pairs similarity search".

BLOCK_PAIRS = 1 << 20
"""Pairs that are looked at together."""
FEW_PAIRS = 1 << 14
"""Documents with at most so many pairs among themselves are compared each with each."""
RUN = 1 << 22
"""Marks of kept documents from which on a run grows no more: to put two together, both are there twice."""
NONE = (NO_NUMBERS, NO_NUMBERS, np.zeros(0))
"""No pairs: earlier documents, later ones, similarities."""


@dataclass(frozen=True)
class Marked:
    """Marks of documents, by mark and then by document."""

    mark: ndarray
    """uint64."""
    document: ndarray
    """int32: its place in the order of preference."""

    @classmethod
    def of(cls, mark: ndarray, document: ndarray) -> Marked:
        order = np.lexsort((document, mark))
        return cls(mark[order], document[order])

    def __len__(self) -> int:
        return len(self.mark)

    def where(self, chosen: ndarray) -> Marked:
        return Marked(self.mark[chosen], self.document[chosen])

    def without(self, documents: ndarray) -> Marked:
        """Args: documents: ascending."""
        return self.where(~held(documents, self.document)) if len(documents) else self

    def together(self, other: Marked) -> Marked:
        return Marked.of(np.append(self.mark, other.mark), np.append(self.document, other.document))

    def meeting(self, other: Marked) -> tuple[ndarray, ndarray]:
        """Return where the entries of this with the mark of each of the other's begin, and how many they are."""
        begins = np.searchsorted(self.mark, other.mark)
        return begins, np.searchsorted(self.mark, other.mark, "right") - begins


class Greedy:
    """What is kept and dropped so far.

    Args:
        similar: places of earlier and later documents, pair by pair → their similarity; less than the threshold where
            they are no pair that may be twins.
    """

    def __init__(self, similar: Callable[[ndarray, ndarray], ndarray], threshold: float):
        self.similar = similar
        self.threshold = threshold
        self.kept: list[Marked] = []  # runs, each at least four times as long as the next one, or of `RUN`
        self.twins: list[tuple[ndarray, ndarray, ndarray]] = [NONE]  # kept, dropped, similarity

    def decide(self, block: Marked) -> None:
        """Decide the next documents in order."""
        self.kept.append(self.among(self.without_twins(self.kept, block)))
        while len(self.kept) > 1 and len(self.kept[-2]) < min(4 * len(self.kept[-1]), RUN):
            last, before = self.kept.pop(), self.kept.pop()
            self.kept.append(before.together(last))

    def among(self, block: Marked) -> Marked:
        """Decide documents that are no twins of earlier ones. Returns those that are kept."""
        few = int(block.meeting(block)[1].sum()) <= FEW_PAIRS + len(block)
        documents = distinct(block.document)
        if few or len(documents) == 1:
            return self.without_twins([block], block)
        is_first = block.document < float(np.median(documents))
        first = self.among(block.where(is_first))
        return first.together(self.among(self.without_twins([first], block.where(~is_first))))

    def without_twins(self, earlier: Sequence[Marked], later: Marked) -> Marked:
        """Drop each later document that reaches the threshold with an earlier one which is kept, for the first such
        one. Returns the others."""
        found = [NONE]
        for one, other in pairs(earlier, later):
            similarity = self.similar(one, other)
            enough = similarity >= self.threshold
            found.append((one[enough], other[enough], similarity[enough]))
        kept, dropped, similarity = join_columns(found)
        order = np.lexsort((kept, dropped))
        gone: dict[int, int] = {}
        for row, one, other in zip(order.tolist(), kept[order].tolist(), dropped[order].tolist(), strict=True):
            if one not in gone and other not in gone:
                gone[other] = row
        rows = np.fromiter(gone.values(), np.int64, len(gone))
        self.twins.append((kept[rows], dropped[rows], similarity[rows]))
        return later.without(dropped[rows])

    def found(self) -> tuple[ndarray, ndarray, ndarray]:
        """Return the places of the documents that twins were kept of, of those dropped, and their similarities; by the
        latter."""
        kept, dropped, similarity = join_columns(self.twins)
        order = np.argsort(dropped)
        return kept[order], dropped[order], similarity[order]


def pairs(earlier: Sequence[Marked], later: Marked) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield pairs of documents that have a mark in common, the earlier one first, a bounded number at a time."""
    waiting = NO_NUMBERS
    for some in earlier:
        begins, counts = some.meeting(later)
        for at, end in spans(counts, BLOCK_PAIRS, max(len(counts), 1)):
            one = some.document[ranges(begins[at:end], counts[at:end])].astype(np.int64)
            other = np.repeat(later.document[at:end], counts[at:end]).astype(np.int64)
            waiting = distinct(np.append(waiting, (other << 32 | one)[one < other]))
            if len(waiting) > BLOCK_PAIRS:
                yield waiting & 0xFFFFFFFF, waiting >> 32
                waiting = waiting[:0]
    yield waiting & 0xFFFFFFFF, waiting >> 32


# --- Sketches of sets tell of most pairs, by some nanoseconds of work, that they cannot be alike.
#
# Source: bitmap filter, Sandes, Teodoro and Melo 2020, "Bitmap filter: speeding up exact set similarity joins with
# bitwise operations".

BITS = 512
AT_ONCE = 1 << 14
"""Pairs that are looked at together, so that they stay in a core's cache."""


class Sketches:
    """Of each document as many bits, each the parity of the number of its shingles that belong to it.

    Args:
        places: of the documents that will have one, ascending.
    """

    def __init__(self, places: ndarray) -> None:
        self.places = places
        self.bits = np.zeros((len(places), BITS // 64), np.uint64)

    def add(self, places: ndarray, sets: Shingles) -> None:
        """Args: sets: at most 1,024, of the documents at these places."""
        bit = (sets.values & np.uint64(BITS - 1)).astype(np.int64)
        odd = np.bincount(sets.owners * BITS + bit, minlength=len(sets) * BITS) & 1
        packed = np.packbits(odd.astype(bool).reshape(len(sets), BITS), axis=1)
        self.bits[np.searchsorted(self.places, places)] = packed.view(np.uint64)

    def may(self, a: ndarray, b: ndarray, sizes: ndarray, threshold: float) -> ndarray:
        """Return whether the documents at places `a` and `b` may be as similar as the threshold, pair by pair (bool).

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
            one, other = (np.searchsorted(self.places[:-1], places[here]) for places in (a, b))
            known = (self.places[one] == a[here]) & (self.places[other] == b[here])
            apart = np.bitwise_count(self.bits[one] ^ self.bits[other]).sum(1, dtype=np.int64)
            found[here] = ~known | (apart <= most[here])
        return found
