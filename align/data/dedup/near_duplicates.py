"""Selection of the duplicates to drop, and of the document that is kept for each. Exact duplicates have equal digests.

Documents are decided in order of preference. One is dropped if and only if an earlier document that is *kept* shares a
band's key with it and is its near-duplicate. In a chain a ~ b ~ c where a and c are not similar, b is dropped and c is
kept. Connected components would drop c although no similar document is left.

Two documents are **near-duplicates** if the Jaccard similarity of their shingles reaches the threshold, and their
numbers and operators are the same (`align.data.dedup.numbers`). If more than half of their common shingles are text
that many documents share, that text does not count: the similarity of the remaining shingles has to reach the threshold
too. If one document has fewer than `OWN` remaining shingles, the sets have to be equal.
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
    """Groups of documents that share a key. A document is its place in the order of preference: 0 is the most
    preferred."""

    members: ndarray
    """int32: places of each group's documents, ascending, group after group."""
    sizes: ndarray
    """int64 (G): at least 2."""

    @property
    def first(self) -> ndarray:
        """Offset of each group in `members`, int64 (G)."""
        return np.cumsum(self.sizes) - self.sizes

    def sampled(self, min_size: int, count: int) -> ndarray:
        """Return the places of `most` evenly spaced members of each group that has more than `larger` members,
        ascending."""
        is_large = self.sizes > min_size
        step = np.arange(count) * self.sizes[is_large, None] // count
        return distinct(self.members[(self.first[is_large, None] + step).ravel()])


class Memberships(NamedTuple):
    """Groups of each document that is in any group."""

    documents: ndarray
    """int32 (D): places, ascending."""
    offsets: ndarray
    """int64 (D+1): document `d` has the groups from `offsets[d]` to `offsets[d + 1]`."""
    groups: ndarray
    """int32: numbers of the groups, ascending for each document."""

    @classmethod
    def of(cls, groups: Groups) -> Memberships:
        order = np.argsort(groups.members, kind="stable")
        members = groups.members[order]
        starts = np.flatnonzero(np.diff(members, prepend=-1))
        group = np.repeat(np.arange(len(groups.sizes), dtype=np.int32), groups.sizes)[order]
        return cls(members[starts], np.append(starts, len(members)), group)

    def blocks(self, costs: ndarray, budget: int, most: int) -> Iterator[tuple[ndarray, ndarray]]:
        """Yield the memberships of documents in order, at most `most` documents at a time.

        Args:
            costs: cost of the document at each place.
            budget: largest total cost of a block. A document that costs more is a block of its own.

        Yields:
            The place of the document and the number of the group of each membership.
        """
        for start, end in spans(costs[self.documents], budget, most):
            offsets = self.offsets[start : end + 1]
            yield np.repeat(self.documents[start:end], np.diff(offsets)), self.groups[offsets[0] : offsets[-1]]

    def in_any(self, group_mask: ndarray) -> ndarray:
        """Return the places of the documents in any of the masked groups (bool (G)), ascending (int32)."""
        chosen_counts = np.diff(np.append(0, np.cumsum(group_mask[self.groups]))[self.offsets])
        return self.documents[chosen_counts > 0]

    def meet(self, a: ndarray, b: ndarray) -> ndarray:
        """Return whether the documents at places `a` and `b` have a group in common, pair by pair (bool)."""
        slices = []
        for places in (a, b):
            rows = np.searchsorted(self.documents, places)
            slices += [self.groups, self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]]
        return count_shared(*slices, bits=32) > 0


def sharing(place: ndarray, has_keys: ndarray, load_band: Callable[[int], ndarray], bands: int = BANDS) -> Groups:
    """Group the documents that share a key in any band. A group that several bands yield is returned once.

    Equal groups are found by 64-bit hashes of their members. Among ten million groups, two different ones have the same
    hash in one of 4·10⁵ data sets.

    Args:
        place: place of each document, int32 (N), a permutation.
        has_keys: whether each document has keys, bool (N).
        load_band: band → keys of all documents, uint64 (N). It is called once for each band.
    """
    known_groups = NO_HASHES
    members = list[ndarray]()
    sizes = list[ndarray]()
    all_have_keys = bool(has_keys.all())
    for band in range(bands):
        keys = load_band(band)
        places, size = groups_of(keys if all_have_keys else keys[has_keys], place if all_have_keys else place[has_keys])
        if not len(size):
            continue
        group_hashes = mixed(places.astype(np.uint64) * ODD + ODD)  # not 0 for place 0, which would not change a sum
        group_hashes = mixed(np.add.reduceat(group_hashes, np.cumsum(size) - size))
        is_unseen = ~held(known_groups, group_hashes)
        members.append(places[np.repeat(is_unseen, size)])
        sizes.append(size[is_unseen])
        known_groups = np.sort(np.append(known_groups, group_hashes[is_unseen]))
    return Groups(join(members, np.zeros(0, np.int32)), join(sizes, NO_NUMBERS))


def groups_of(keys: ndarray, place: ndarray) -> tuple[ndarray, ndarray]:
    """Group documents by their key. Returns the places of the members of all groups of at least two, ascending in each
    group, and the sizes of the groups."""
    order = np.argsort(keys)
    sorted_keys = keys[order]
    repeats_previous = np.zeros(len(keys) + 1, bool)  # whether a key equals the one before
    np.equal(sorted_keys[1:], sorted_keys[:-1], out=repeats_previous[1:-1])
    is_shared = repeats_previous[1:] | repeats_previous[:-1]
    is_first = ~repeats_previous[:-1][is_shared]
    entries = np.cumsum(is_first, dtype=np.int64) << 32 | place[order[is_shared]]
    entries.sort()
    return (entries & 0xFFFFFFFF).astype(np.int32), np.diff(np.append(np.flatnonzero(is_first), len(is_first)))


def packs(groups: Groups, costs: ndarray, count: int) -> list[ndarray]:
    """Split the documents of groups into at most `count` packs that can be deduplicated independently.

    Groups that have members in common, directly or through other groups, are in one pack, so a pack may be large.

    Args:
        groups: groups whose members are numbers of documents.
        costs: cost of each document.

    Returns:
        The numbers of each pack's documents, ascending (int64).
    """
    first = np.repeat(groups.members[groups.first], groups.sizes)
    labels = components(len(costs), first.astype(np.int64), groups.members.astype(np.int64))
    members = distinct(groups.members).astype(np.int64)
    heads, component = np.unique(labels[members], return_inverse=True)
    by_cost = np.argsort(-np.bincount(component, costs[members], len(heads)), kind="stable")
    pack = np.empty(len(heads), np.int64)
    pack[by_cost] = np.arange(len(heads)) % count
    return [members[pack[component] == number] for number in range(min(count, len(heads)))]


# --- Text that many documents share: instructions, templates, preambles. It does not count when documents are
# compared.
#
# Documents with a band's key in common are a group. A shingle that half of a group of at least `MANY` documents have is
# *shared*. Templates may be nested (a preamble of all rows, an instruction of some), so one group for each document is
# not enough: of the groups of each document, the largest of every size class (powers of two) is counted. A template
# that more than half of a larger family has is shared in that family's group. Any other template has groups of a lower
# class. In a large group only a sample is counted, which depends on the documents' content and not on their order.

MANY = 16
"""Least size of a group whose common text may be shared."""
COUNTED = 64
"""Largest number of documents of a group that are counted."""
SHARE = 0.5
"""Least share of the counted documents that have a shared shingle."""
OWN = 24
"""Least number of shingles beside shared text. Documents with fewer are duplicates only if their sets are equal."""
BLOCK_GROUPS = 1 << 64 - HASH_BITS
"""Largest number of groups that are counted together."""
BLOCK_SHINGLES = 1 << 22
"""Largest number of shingles that are in memory together."""


def find_shared(
    groups: Groups, index: ndarray, sizes: ndarray, content: ndarray, load_shingles: Callable[[ndarray], Shingles]
) -> ndarray:
    """Find the shared shingles, uint64, ascending.

    Args:
        groups: groups whose members are places.
        index: the document at each place, int64 (N).
        sizes: number of shingles of each document (N).
        content: hash of each document's content, uint64 (N). Those with the smallest hashes are sampled.
        load_shingles: loads the shingles of documents (int64, ascending).
    """
    shared = NO_HASHES
    samples = [index[members] for members in select_samples(groups, content[index])]
    costs = np.array([sizes[documents].sum(dtype=np.int64) for documents in samples], np.int64)
    for start, end in spans(costs, BLOCK_SHINGLES, BLOCK_GROUPS):
        documents = distinct(np.concatenate(samples[start:end]))
        sets = load_shingles(documents)
        counted = [count_group(sets, np.searchsorted(documents, sample)) for sample in samples[start:end]]
        shared = distinct(join(counted, shared))
    return shared


def count_group(sets: Shingles, rows: ndarray) -> ndarray:
    """Return the shingles that at least `SHARE` of the sets in `rows` have, uint64."""
    values = np.sort(np.concatenate([sets.values[sets.offsets[row] : sets.offsets[row + 1]] for row in rows]))
    required = int(np.ceil(SHARE * len(rows)))
    if required > len(values):
        return NO_HASHES
    return distinct(values[required - 1 :][values[required - 1 :] == values[: len(values) - required + 1]])


def select_samples(groups: Groups, content: ndarray) -> Iterator[ndarray]:
    """Yield the sample of each group that is counted: the `COUNTED` members with the smallest content hashes, and
    members whose hash equals the last of these.

    Args:
        content: content hash of the document at each place.
    """
    starts = groups.first
    classes = np.frexp(groups.sizes.astype(np.float64))[1]
    large = groups.sizes >= MANY
    for size_class in np.unique(classes[large]).tolist():
        group_numbers = np.flatnonzero(large & (classes == size_class))
        group_numbers = group_numbers[np.argsort(-groups.sizes[group_numbers], kind="stable")]
        largest = np.zeros(len(content), np.int64)
        for group in group_numbers.tolist():
            size = int(groups.sizes[group])
            members = groups.members[starts[group] : starts[group] + size]
            if (largest[members] <= size).any():
                largest[members] = np.maximum(largest[members], size)
                hashes = content[members]
                yield members if size <= COUNTED else members[hashes <= np.partition(hashes, COUNTED - 1)[COUNTED - 1]]


BLOCK = 1 << 12
"""Largest number of documents that are decided together."""
SKETCHED = 8
"""Size of a group above which its members get sketches. A sketch costs as much as some comparisons."""
LARGE = 64
"""Size of a group above which its members are compared by rare shingles."""
SAMPLED = 32
"""Members of a large group from which frequencies of shingles are estimated."""
WHOLE = np.uint64(1 << 62)
"""A bit that is set in every mark that is a hash of a whole set, and in no mark that is a group."""

Sets = Callable[[ndarray], Shingles]


class Duplicates(NamedTuple):
    """Dropped documents in order of preference, each with the document that is kept for it."""

    dropped: ndarray
    """int64: number of the dropped document."""
    kept: ndarray
    """int64: number of the first kept document, in order of preference, that it is a duplicate of."""
    jaccard: ndarray
    """float64: Jaccard similarity of the two; 1 for exact duplicates."""
    exact: ndarray
    """bool: whether it is an exact duplicate."""

    def renumbered(self, numbers: ndarray) -> Duplicates:
        """Replace each document `i` by `numbers[i]`, int64 (N)."""
        return self._replace(dropped=numbers[self.dropped], kept=numbers[self.kept])


def find_exact(digests: ndarray, order: ndarray, sources: ndarray | None = None, across: bool = False) -> Duplicates:
    """Find the documents to drop because their digest equals that of one earlier in order of preference.

    Args:
        digests: N digests of 16 bytes (`normalised_digests`).
        order, sources, across: as for `find_near`.
    """
    halves = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)
    source_keys = sources if sources is not None and not across else np.zeros(len(order), np.int64)
    sorted_rows = np.lexsort(
        (order, source_keys, halves[:, 1], halves[:, 0])
    )  # stable: equal ranks stay in order of index
    is_first = is_new(*(key[sorted_rows] for key in (halves[:, 0], halves[:, 1], source_keys)))
    kept = sorted_rows[is_first][np.cumsum(is_first) - 1]
    is_dropped = ~is_first
    if sources is not None and across:
        is_dropped &= sources[sorted_rows] != sources[kept]
    dropped = sorted_rows[is_dropped]
    kept = kept[is_dropped]
    by_preference = np.lexsort((dropped, order[dropped]))
    exact = np.ones(len(dropped), bool)
    return Duplicates(dropped[by_preference], kept[by_preference], exact.astype(np.float64), exact)


def find_near(
    order: ndarray,
    sizes: ndarray,
    load_band: Callable[[int], ndarray],
    load_shingles: Sets,
    threshold: float = 0.7,
    bands: int = BANDS,
    sources: ndarray | None = None,
    across: bool = False,
    numbers: ndarray | None = None,
    content: ndarray | None = None,
    shared: ndarray | None = None,
) -> Duplicates:
    """Find the documents to drop because they are near-duplicates of one that is kept.

    Args:
        order: rank of preference of each document, int64 (N). The lower rank is kept; of equal ranks the first
            document.
        sizes: number of shingles of each document, integers (N). A document without shingles has no keys and is kept.
        load_band: band → keys of all documents in that band (`band_keys`), uint64 (N). It is called once for each band.
        load_shingles: loads the shingles of documents (int64, ascending).
        threshold: least Jaccard similarity of near-duplicates, in (0, 1], exact on hashed shingles (`Shingles`).
        sources: source of each document, integers (N). If given, only documents of the same source are compared.
        across: compare only documents of different sources instead.
        numbers: hash of each document's numbers and operators (`number_hashes`), uint64 (N). None ignores these.
        content: hash of each document's content, uint64 (N), by which shared text is found (`find_shared`).
        shared: the shared shingles, ascending, if the caller has them. Without it and `content`, no text is shared.
    """
    documents = Documents(np.argsort(order, kind="stable"), sizes, load_shingles)
    place = np.empty(len(order), np.int32)
    place[documents.index] = np.arange(len(order), dtype=np.int32)
    groups = sharing(place, sizes > 0, load_band, bands)
    if shared is None:
        shared = NO_HASHES if content is None else find_shared(groups, documents.index, sizes, content, load_shingles)
    memberships = Memberships.of(groups)
    is_large_group = groups.sizes > LARGE
    rarity = Rarity(shared)
    for _, sets in documents.sets(groups.sampled(LARGE, SAMPLED)):
        rarity.add(sets)

    def similar(earlier: ndarray, later: ndarray) -> ndarray:
        a = documents.index[earlier]
        b = documents.index[later]
        max_similarity = np.minimum(sizes[a], sizes[b]) / np.maximum(sizes[a], sizes[b])
        is_candidate = max_similarity >= threshold
        if sources is not None:
            is_candidate &= (sources[a] != sources[b]) == across
        if numbers is not None:
            is_candidate &= numbers[a] == numbers[b]
        is_candidate[is_candidate] = sketches.may(
            earlier[is_candidate], later[is_candidate], sizes[a[is_candidate]] + sizes[b[is_candidate]], threshold
        )
        similarity = np.zeros(len(a))
        similarity[is_candidate] = documents.similarities(a[is_candidate], b[is_candidate], threshold, shared)
        reaching = np.flatnonzero(similarity >= threshold)
        share_no_group = ~memberships.meet(earlier[reaching], later[reaching])  # they share a rare shingle, but no key
        similarity[reaching[share_no_group]] = 0
        return similarity

    sketches = Sketches(memberships.in_any(groups.sizes > min(SKETCHED, LARGE)))
    del groups  # takes as much memory as the memberships
    greedy = Greedy(similar, threshold)

    def mark(places: ndarray, group: ndarray) -> Marked:
        """Return the marks of documents, and add their sketches.

        In large groups, near-duplicates have a rare shingle in common that is not shared text, or the same set.

        Args:
            places, group: document and group of each membership.
        """
        of_large = is_large_group[group]
        marks = [group[~of_large].astype(np.uint64)]
        owners = [places[~of_large]]
        large_members = distinct(places[of_large])
        for members, sets in documents.sets(distinct(places[held(sketches.places, places)])):
            sketches.add(members, sets)
            in_large_group = held(large_members, members)
            members = members[in_large_group]
            sets = sets.where(in_large_group)
            rare, set_of_mark = rarity.marks(sets, threshold)
            marks.append(rare)
            owners.append(members[set_of_mark])
            if len(shared):
                marks.append(hash_sets(sets))
                owners.append(members)
        return Marked.of(np.concatenate(marks), np.concatenate(owners))

    for places, group in memberships.blocks(sizes[documents.index], 2 * BLOCK_SHINGLES, BLOCK):
        greedy.decide(mark(places, group))
    kept, dropped, similarity = join_columns(greedy.pairs)
    order = np.argsort(dropped)
    duplicates = Duplicates(dropped[order], kept[order], similarity[order], np.zeros(len(order), bool))
    return duplicates.renumbered(documents.index)


def hash_sets(sets: Shingles) -> ndarray:
    """Hash each whole set to a mark, uint64 (N). No set may be empty."""
    if not len(sets):
        return NO_HASHES
    sums = np.add.reduceat(mixed(sets.values * ODD + ODD), sets.offsets[:-1])
    return mixed(sums) >> np.uint64(2) | WHOLE


@dataclass(frozen=True)
class Documents:
    """Access to documents by their places in the order of preference."""

    index: ndarray
    """int64 (N): number of the document at each place."""
    sizes: ndarray
    """Number of shingles of each document."""
    read: Sets

    def sets(self, places: ndarray) -> Iterator[tuple[ndarray, Shingles]]:
        """Yield places of documents and their shingles, for all of `places`, a bounded number at a time."""
        places = places[np.argsort(self.index[places])]
        for start, end in spans(self.sizes[self.index[places]], BLOCK_SHINGLES, BLOCK_DOCUMENTS):
            yield places[start:end], self.read(self.index[places[start:end]])

    def similarities(self, a: ndarray, b: ndarray, threshold: float, shared: ndarray) -> ndarray:
        """Return the Jaccard similarity of the documents `a` and `b`, float64 (pairs). It is 0 for pairs that are
        similar by shared text only."""
        similarities = np.zeros(len(a))
        for start, end in spans(self.sizes[a].astype(np.int64) + self.sizes[b], BLOCK_SHINGLES, len(a)):
            documents = distinct(np.append(a[start:end], b[start:end]))
            rows_a = np.searchsorted(documents, a[start:end])
            rows_b = np.searchsorted(documents, b[start:end])
            similarities[start:end] = compare_sets(self.read(documents), rows_a, rows_b, threshold, shared)
        return similarities


def compare_sets(sets: Shingles, a: ndarray, b: ndarray, threshold: float, shared: ndarray) -> ndarray:
    """Return the Jaccard similarity of the sets `a` and `b`, pair by pair, float64. It is 0 for pairs that reach the
    threshold by shared text only.

    Args:
        shared: the shared shingles, ascending.
    """
    common = count_common(sets, a, sets, b)
    union = sets.sizes[a] + sets.sizes[b] - common
    similarity = common / np.maximum(union, 1)
    pairs = np.flatnonzero((similarity >= threshold) & (common < union))  # equal sets are near-duplicates
    if not len(shared) or not len(pairs):
        return similarity
    a = a[pairs]
    b = b[pairs]
    common = common[pairs]
    union = union[pairs]
    smaller_size = np.minimum(sets.sizes[a], sets.sizes[b])
    is_used = np.zeros(len(sets), bool)
    is_used[a] = is_used[b] = True
    shared_sets = sets.where(is_used).only(shared)
    row_of_set = np.cumsum(is_used) - 1
    common_shared = count_common(shared_sets, row_of_set[a], shared_sets, row_of_set[b])
    is_similar_otherwise = ((common - common_shared) >= threshold * (union - common_shared)) & (
        smaller_size - common_shared >= OWN
    )
    similarity[pairs[(2 * common_shared > common) & ~is_similar_otherwise]] = 0
    return similarity


# --- Greedy selection: documents are kept or dropped one after another in order of preference.
#
# Two documents are compared only if they have a *mark* in common. The marks of a document are the groups that it is in.
# In a large group (of texts from one template, say) too many pairs would be compared, and hardly any are similar. Its
# marks are the document's rarest shingles without those of shared text, and a hash of the whole set. There are so
# many rare ones that two sets without a common one are below the threshold.
#
# Source: prefix filtering, Bayardo, Ma and Srikant 2007, "Scaling up all pairs similarity search".

BLOCK_PAIRS = 1 << 20
"""Largest number of candidate pairs that are compared together."""
FEW_PAIRS = 1 << 14
"""Candidate pairs of a block up to which all of them are compared, without splitting the block."""
RUN = 1 << 22
"""Marks of a run of kept documents above which it is not merged any more, because merging doubles its memory."""
NONE = (NO_NUMBERS, NO_NUMBERS, np.zeros(0))
"""An empty list of pairs: earlier documents, later documents, similarities."""


@dataclass(frozen=True)
class Marked:
    """Pairs of a mark and a document, sorted by mark and then by document."""

    mark: ndarray
    """uint64."""
    document: ndarray
    """int32: place in the order of preference."""

    @classmethod
    def of(cls, mark: ndarray, document: ndarray) -> Marked:
        order = np.lexsort((document, mark))
        return cls(mark[order], document[order])

    def __len__(self) -> int:
        return len(self.mark)

    def where(self, mask: ndarray) -> Marked:
        return Marked(self.mark[mask], self.document[mask])

    def without(self, documents: ndarray) -> Marked:
        """Return the entries without those of some documents, which are ascending."""
        return self.where(~held(documents, self.document)) if len(documents) else self

    def together(self, other: Marked) -> Marked:
        return Marked.of(np.append(self.mark, other.mark), np.append(self.document, other.document))

    def meeting(self, other: Marked) -> tuple[ndarray, ndarray]:
        """Find the entries with the mark of each entry of `other`. Returns the index of the first one, and their
        number."""
        begins = np.searchsorted(self.mark, other.mark)
        return begins, np.searchsorted(self.mark, other.mark, "right") - begins


class Greedy:
    """Greedy selection of the documents to keep and to drop.

    Args:
        similar: computes the similarity of earlier and later documents, pair by pair, from their places. It is below
            the threshold for pairs that must not count as near-duplicates.
    """

    def __init__(self, similar: Callable[[ndarray, ndarray], ndarray], threshold: float):
        self.similar = similar
        self.threshold = threshold
        self.kept: list[Marked] = []  # runs, each at least four times as long as the next one, or of `RUN`
        self.pairs: list[tuple[ndarray, ndarray, ndarray]] = [NONE]  # kept, dropped, similarity

    def decide(self, block: Marked) -> None:
        """Decide the next block of documents in order of preference."""
        self.kept.append(self.among(self.drop_similar(self.kept, block)))
        while len(self.kept) > 1 and len(self.kept[-2]) < min(4 * len(self.kept[-1]), RUN):
            last = self.kept.pop()
            self.kept[-1] = self.kept[-1].together(last)

    def among(self, block: Marked) -> Marked:
        """Decide documents that are similar to no document of an earlier block. Returns those that are kept."""
        compares_all = int(block.meeting(block)[1].sum()) <= FEW_PAIRS + len(block)
        documents = distinct(block.document)
        if compares_all or len(documents) == 1:
            return self.drop_similar([block], block)
        is_first = block.document < float(np.median(documents))
        first = self.among(block.where(is_first))
        return first.together(self.among(self.drop_similar([first], block.where(~is_first))))

    def drop_similar(self, earlier: Sequence[Marked], later: Marked) -> Marked:
        """Drop each later document that is similar to an earlier one which is kept, and record the first such one.
        Returns the other later documents."""
        columns = [NONE]
        for earlier_places, later_places in meeting_pairs(earlier, later):
            similarity = self.similar(earlier_places, later_places)
            is_similar = similarity >= self.threshold
            columns.append((earlier_places[is_similar], later_places[is_similar], similarity[is_similar]))
        kept, dropped, similarity = join_columns(columns)
        order = np.lexsort((kept, dropped))
        dropped_rows: dict[int, int] = {}
        for row, earlier_places, later_places in zip(
            order.tolist(), kept[order].tolist(), dropped[order].tolist(), strict=True
        ):
            if earlier_places not in dropped_rows and later_places not in dropped_rows:
                dropped_rows[later_places] = row
        rows = np.fromiter(dropped_rows.values(), np.int64, len(dropped_rows))
        self.pairs.append((kept[rows], dropped[rows], similarity[rows]))
        return later.without(dropped[rows])


def meeting_pairs(earlier: Sequence[Marked], later: Marked) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield the pairs of documents with a mark in common, as places of the earlier and of the later ones, a bounded
    number at a time."""
    pairs = NO_NUMBERS
    for table in earlier:
        begins, counts = table.meeting(later)
        for start, end in spans(counts, BLOCK_PAIRS, max(len(counts), 1)):
            earlier_places = table.document[ranges(begins[start:end], counts[start:end])].astype(np.int64)
            later_places = np.repeat(later.document[start:end], counts[start:end]).astype(np.int64)
            pairs = distinct(np.append(pairs, (later_places << 32 | earlier_places)[earlier_places < later_places]))
            if len(pairs) > BLOCK_PAIRS:
                yield pairs & 0xFFFFFFFF, pairs >> 32
                pairs = pairs[:0]
    yield pairs & 0xFFFFFFFF, pairs >> 32


# --- Sketches of sets: they rule out most pairs within some nanoseconds.
#
# Source: bitmap filter, Sandes, Teodoro and Melo 2020, "Bitmap filter: speeding up exact set similarity joins with
# bitwise operations".

BITS = 512
AT_ONCE = 1 << 14
"""Pairs that are compared at once, so few that they stay in a core's cache."""


class Sketches:
    """Bitmaps of sets: bit `i` is the parity of the number of shingles whose lowest bits are `i`.

    Args:
        places: places of the documents that will have a sketch, ascending.
    """

    def __init__(self, places: ndarray) -> None:
        self.places = places
        self.bits = np.zeros((len(places), BITS // 64), np.uint64)

    def add(self, places: ndarray, sets: Shingles) -> None:
        """Add the sketches of the documents at `places`, whose sets these are. There may be at most 1,024."""
        bit = (sets.values & np.uint64(BITS - 1)).astype(np.int64)
        parity = np.bincount(sets.owners * BITS + bit, minlength=len(sets) * BITS) & 1
        packed = np.packbits(parity.astype(bool).reshape(len(sets), BITS), axis=1)
        self.bits[np.searchsorted(self.places, places)] = packed.view(np.uint64)

    def may(self, a: ndarray, b: ndarray, sizes: ndarray, threshold: float) -> ndarray:
        """Return whether the similarity of the documents at places `a` and `b` may reach the threshold, pair by pair
        (bool).

        Two sets differ by at least as many shingles as their sketches have different bits.

        Args:
            sizes: total number of shingles of both documents of each pair.
        """
        may_be_similar = np.ones(len(a), bool)
        if not len(self.places):
            return may_be_similar
        max_difference = (
            sizes * ((1 - threshold) / (1 + threshold)) * (1 + 1e-9)
        )  # J is below the threshold if sets differ by more
        for start in range(0, len(a), AT_ONCE):
            span = slice(start, start + AT_ONCE)
            rows_a, rows_b = (np.searchsorted(self.places[:-1], places[span]) for places in (a, b))
            has_sketches = (self.places[rows_a] == a[span]) & (self.places[rows_b] == b[span])
            differing_bits = np.bitwise_count(self.bits[rows_a] ^ self.bits[rows_b]).sum(1, dtype=np.int64)
            may_be_similar[span] = ~has_sketches | (differing_bits <= max_difference[span])
        return may_be_similar
