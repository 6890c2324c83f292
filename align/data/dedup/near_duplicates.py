"""Duplicates: which documents are dropped, and for which kept one. Exact ones have the digest of an earlier one.

Documents are taken in order of preference. One is dropped if and only if an earlier document, which is *kept*, shares
a band's key with it and is its near-duplicate. So a chain a ~ b ~ c loses b to a, and keeps c where c is not alike to
a: connected components would drop c, of which nothing alike is left.

Two documents are **near-duplicates** if the Jaccard similarity of their shingles reaches the threshold, and their
numbers and operators are the same (`align.data.dedup.numbers`), and this holds: where more than half of the shingles
that they have in common are text that many documents share, that text does not count. The similarity of the rest has to
reach the threshold too; if one of them has fewer than `OWN` shingles beside it, their sets have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from align.data.dedup.arrays import (
    NO_HASHES,
    NO_NUMBERS,
    components,
    count_shared,
    distinct,
    held,
    is_new,
    join,
    join_columns,
    ranges,
    spans,
)
from align.data.dedup.shingles import BANDS, BLOCK_DOCUMENTS, HASH_BITS, ODD, Rarity, Shingles, count_common, mixed


class Groups(NamedTuple):
    """Documents that share a key, each by its place: 0 is the most preferred of all documents."""

    members: ndarray
    """int32: the places of each group's documents, ascending, group after group."""
    sizes: ndarray
    """int64 (G): at least 2."""

    @property
    def first(self) -> ndarray:
        """int64 (G): where each group's members begin."""
        return np.cumsum(self.sizes) - self.sizes

    def sampled(self, larger: int, most: int) -> ndarray:
        """Return the places of `most` members of each group that is larger than `larger`, evenly spaced."""
        big = self.sizes > larger
        step = np.arange(most) * self.sizes[big, None] // most
        return distinct(self.members[(self.first[big, None] + step).ravel()])


class Memberships(NamedTuple):
    """The groups of each document that is in one."""

    documents: ndarray
    """int32 (D): places, ascending."""
    offsets: ndarray
    """int64 (D+1): the groups of document `d` are those from `offsets[d]` to `offsets[d + 1]`."""
    groups: ndarray
    """int32: which groups, ascending in each document."""

    @classmethod
    def of(cls, groups: Groups) -> Memberships:
        order = np.argsort(groups.members, kind="stable")
        members = groups.members[order]
        first = np.flatnonzero(np.diff(members, prepend=-1))
        group = np.repeat(np.arange(len(groups.sizes), dtype=np.int32), groups.sizes)[order]
        return cls(members[first], np.append(first, len(members)), group)

    def blocks(self, costs: ndarray, budget: int, most: int) -> Iterator[tuple[ndarray, ndarray]]:
        """Yield documents in order, at most so many at a time: their places, each there once for each of its groups.

        Args:
            costs: of each place.
            budget: of documents together; one that costs more is alone.
        """
        for at, end in spans(costs[self.documents], budget, most):
            offsets = self.offsets[at : end + 1]
            yield np.repeat(self.documents[at:end], np.diff(offsets)), self.groups[offsets[0] : offsets[-1]]

    def in_any(self, chosen: ndarray) -> ndarray:
        """Return the places of the documents that are in any of these groups (bool (G)), ascending (int32)."""
        many = np.diff(np.append(0, np.cumsum(chosen[self.groups]))[self.offsets])
        return self.documents[many > 0]

    def meet(self, a: ndarray, b: ndarray) -> ndarray:
        """Return whether the documents at places `a` and `b` have a group in common, bool (pairs)."""
        sides = []
        for places in (a, b):
            at = np.searchsorted(self.documents, places)
            sides += [self.groups, self.offsets[at], self.offsets[at + 1] - self.offsets[at]]
        return count_shared(*sides, bits=32) > 0


def sharing(place: ndarray, has: ndarray, column: Callable[[int], ndarray], bands: int = BANDS) -> Groups:
    """Return the groups of all bands. Documents that share several keys with the very same others are one group.

    Groups go by 64-bit hashes of their members: one of ten million is taken for another in one of 4·10⁵ data sets.

    Args:
        place: int32 (N), a permutation: the place of each document.
        has: bool (N): which documents have keys.
        column: band → uint64 (N). Asked once for each band; nothing of it is kept.
    """
    seen = NO_HASHES
    members, sizes = list[ndarray](), list[ndarray]()
    everyone = bool(has.all())
    for band in range(bands):
        keys = column(band)
        places, size = groups_of(keys if everyone else keys[has], place if everyone else place[has])
        if not len(size):
            continue
        names = mixed(places.astype(np.uint64) * ODD + ODD)  # not 0 of place 0, which a sum would not show
        names = mixed(np.add.reduceat(names, np.cumsum(size) - size))
        new = ~held(seen, names)
        members.append(places[np.repeat(new, size)])
        sizes.append(size[new])
        seen = np.sort(np.append(seen, names[new]))
    return Groups(join(members, np.zeros(0, np.int32)), join(sizes, NO_NUMBERS))


def groups_of(keys: ndarray, place: ndarray) -> tuple[ndarray, ndarray]:
    """Return the places of the documents whose key another one has, by group and in order; and the sizes of the
    groups."""
    order = np.argsort(keys)
    ranked = keys[order]
    inside = np.zeros(len(keys) + 1, bool)  # whether a key is that of the one before
    np.equal(ranked[1:], ranked[:-1], out=inside[1:-1])
    common = inside[1:] | inside[:-1]
    first = ~inside[:-1][common]
    numbered = np.cumsum(first, dtype=np.int64) << 32 | place[order[common]]
    numbered.sort()
    return (numbered & 0xFFFFFFFF).astype(np.int32), np.diff(np.append(np.flatnonzero(first), len(first)))


def packs(groups: Groups, costs: ndarray, count: int) -> list[ndarray]:
    """Return the documents that are in groups, in at most `count` packs that have none in common: what is kept or
    dropped of one says nothing of another. Groups that are linked by their members are in one, so that a pack may be
    large.

    Args:
        groups: of documents by their numbers.
        costs: of each document.

    Returns:
        the numbers of each pack's documents, ascending (int64).
    """
    first = np.repeat(groups.members[groups.first], groups.sizes)
    root = components(len(costs), first.astype(np.int64), groups.members.astype(np.int64))
    inside = distinct(groups.members).astype(np.int64)
    heads, component = np.unique(root[inside], return_inverse=True)
    dearest = np.argsort(-np.bincount(component, costs[inside], len(heads)), kind="stable")
    pack = np.empty(len(heads), np.int64)
    pack[dearest] = np.arange(len(heads)) % count
    return [inside[pack[component] == number] for number in range(min(count, len(heads)))]


# --- Text that many documents share: instructions, templates, preambles. It does not count where documents are
# compared.
#
# Documents with a band's key in common are a group. A shingle that half of a group of at least `MANY` documents have is
# *shared*. Templates may be nested (a preamble of all rows, an instruction of some), so that one group a document does
# not do: of the groups of each document, the largest of every size class (powers of two) count. A template that more
# than half of a larger family has is shared in that family's group, and any other one has groups of a lower class. Of a
# large group a sample is counted, which goes by what documents say and not by their order.

MANY = 16
"""Documents from which on a group's text may be shared."""
COUNTED = 64
"""Documents of a group that are counted."""
SHARE = 0.5
"""Of the counted documents, that have a shared shingle."""
OWN = 24
"""Shingles. Of documents that have fewer beside the text that they share, all have to be the same."""
BLOCK_GROUPS = 1 << 64 - HASH_BITS
"""Groups that are counted together."""
BLOCK_SHINGLES = 1 << 22
"""Shingles that are in memory together."""


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
    """Yield the members that are counted of each group that counts: the `COUNTED` members with the least content
    hashes, and those that say the same as the last of these.

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
                yield members if size <= COUNTED else members[least <= np.partition(least, COUNTED - 1)[COUNTED - 1]]


BLOCK = 1 << 12
"""Documents that are decided together."""
SKETCHED = 8
"""Groups with more members have sketches: to make one costs as much as some comparisons."""
LARGE = 64
"""Groups with more members are compared by rare shingles."""
SAMPLED = 32
"""Members of a large group that tell which shingles are rare."""
WHOLE = np.uint64(1 << 62)
"""Is in every mark that is a hash of a whole set, and in none that is a group."""

Sets = Callable[[ndarray], Shingles]


class Duplicates(NamedTuple):
    """One row a dropped document, in order of preference."""

    dropped: ndarray
    """int64: which document."""
    kept: ndarray
    """int64: the first kept document, in order of preference, that it is a duplicate of."""
    jaccard: ndarray
    """float64: how alike the two are; 1 for copies."""
    exact: ndarray
    """bool: whether it is a copy."""

    def renumbered(self, numbers: ndarray) -> Duplicates:
        """Return the same of documents that have these numbers, int64 (N)."""
        return self._replace(dropped=numbers[self.dropped], kept=numbers[self.kept])


def find_exact(digests: ndarray, order: ndarray, sources: ndarray | None = None, across: bool = False) -> Duplicates:
    """Return the documents to drop, of N; each names the first one, in order of preference, that it is equal to.

    Args:
        digests: N of 16 bytes (`normalised_digests`).
        order, sources, across: as for `find_near`; only equal documents are duplicates here.
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
    every = np.ones(len(dropped), bool)
    return Duplicates(dropped[by_preference], kept[by_preference], every.astype(np.float64), every)


def find_near(
    order: ndarray,
    sizes: ndarray,
    column: Callable[[int], ndarray],
    read: Sets,
    threshold: float = 0.7,
    bands: int = BANDS,
    sources: ndarray | None = None,
    across: bool = False,
    numbers: ndarray | None = None,
    content: ndarray | None = None,
    shared: ndarray | None = None,
) -> Duplicates:
    """Return the documents to drop, of N.

    Args:
        order: int64 (N): rank of preference of each document; the lower one survives, of equal ranks the first.
        sizes: integers (N): how many shingles each document has. One that has none has no keys, and is kept.
        column: band → uint64 (N), the keys of all documents in that band (`band_keys`). Asked once a band.
        read: indexes (int64, ascending) → the shingles of these documents.
        threshold: the least Jaccard similarity of near-duplicates, in (0, 1], exact on hashed shingles (`Shingles`).
        sources: integers (N): with it, only documents of one source are duplicates; with `across`, only those of two.
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
    for _, sets in documents.sets(groups.sampled(LARGE, SAMPLED)):
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

    def mark(places: ndarray, group: ndarray) -> Marked:
        """Return the marks of documents at `places`, each there once for every `group` of its own, and add their
        sketches. In large groups, near-duplicates have a rare shingle in common that is not shared text, or the same
        set."""
        of_large = large[group]
        marks = [group[~of_large].astype(np.uint64)]
        owners = [places[~of_large]]
        inside = distinct(places[of_large])
        for some, sets in documents.sets(distinct(places[held(sketches.places, places)])):
            sketches.add(some, sets)
            chosen = held(inside, some)
            some, sets = some[chosen], sets.where(chosen)
            rare, of = rarity.marks(sets, threshold)
            marks.append(rare)
            owners.append(some[of])
            if len(shared):
                marks.append(hash_sets(sets))
                owners.append(some)
        return Marked.of(np.concatenate(marks), np.concatenate(owners))

    for places, group in memberships.blocks(sizes[documents.index], 2 * BLOCK_SHINGLES, BLOCK):
        greedy.decide(mark(places, group))
    kept, dropped, similarity = join_columns(greedy.pairs)
    order = np.argsort(dropped)
    found = Duplicates(dropped[order], kept[order], similarity[order], np.zeros(len(order), bool))
    return found.renumbered(documents.index)


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
    pairs = np.flatnonzero((similarity >= threshold) & (common < union))  # equal sets are near-duplicates
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
            they are no pair that may be near-duplicates.
    """

    def __init__(self, similar: Callable[[ndarray, ndarray], ndarray], threshold: float):
        self.similar = similar
        self.threshold = threshold
        self.kept: list[Marked] = []  # runs, each at least four times as long as the next one, or of `RUN`
        self.pairs: list[tuple[ndarray, ndarray, ndarray]] = [NONE]  # kept, dropped, similarity

    def decide(self, block: Marked) -> None:
        """Decide the next documents in order."""
        self.kept.append(self.among(self.drop_similar(self.kept, block)))
        while len(self.kept) > 1 and len(self.kept[-2]) < min(4 * len(self.kept[-1]), RUN):
            last, before = self.kept.pop(), self.kept.pop()
            self.kept.append(before.together(last))

    def among(self, block: Marked) -> Marked:
        """Decide documents that are alike to no earlier ones. Returns those that are kept."""
        few = int(block.meeting(block)[1].sum()) <= FEW_PAIRS + len(block)
        documents = distinct(block.document)
        if few or len(documents) == 1:
            return self.drop_similar([block], block)
        is_first = block.document < float(np.median(documents))
        first = self.among(block.where(is_first))
        return first.together(self.among(self.drop_similar([first], block.where(~is_first))))

    def drop_similar(self, earlier: Sequence[Marked], later: Marked) -> Marked:
        """Drop each later document that reaches the threshold with an earlier one which is kept, for the first such
        one. Returns the others."""
        found = [NONE]
        for one, other in meeting_pairs(earlier, later):
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
        self.pairs.append((kept[rows], dropped[rows], similarity[rows]))
        return later.without(dropped[rows])


def meeting_pairs(earlier: Sequence[Marked], later: Marked) -> Iterator[tuple[ndarray, ndarray]]:
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
