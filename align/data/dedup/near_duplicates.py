"""Selection of the duplicates to drop, and of the document that is kept for each. Exact duplicates have equal digests.

Documents are decided in order of preference. One is dropped if and only if an earlier document that is *kept* shares a
band's key with it and is its near-duplicate. In a chain a ~ b ~ c where a and c are not similar, b is dropped and c is
kept. Connected components would drop c although no similar document is left.

Two documents are **near-duplicates** if the Jaccard similarity of their shingles reaches the threshold, and their
numbers and operators are the same (`align.data.dedup.numbers`). If more than half of their common shingles are text
that many documents share, that text does not count: the similarity of the remaining shingles has to reach the threshold
too. If one document has fewer than `MIN_OWN_SHINGLES` remaining shingles, the sets have to be equal.
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
    concatenate,
    concatenate_columns,
    concatenate_ranges,
    count_shared_values,
    differs_from_previous,
    is_in_sorted,
    label_components,
    sort_unique,
    split_by_budget,
)
from align.data.dedup.shingles import (
    BANDS,
    BLOCK_DOCUMENTS,
    HASH_BITS,
    ODD_MULTIPLIER,
    ShingleRarity,
    Shingles,
    count_common,
    mix_bits_in_place,
)


class DocumentGroups(NamedTuple):
    """Groups of documents that share a MinHash key. A document is given by its preference rank, its position in the
    order of preference: 0 is the most preferred."""

    members: ndarray
    """int32: ranks of each group's documents, ascending, group after group."""
    sizes: ndarray
    """int64 (G): at least 2."""

    @property
    def first(self) -> ndarray:
        """Offset of each group's first document in `members`, int64 (G)."""
        return np.cumsum(self.sizes) - self.sizes

    def sample_members(self, min_size: int, count: int) -> ndarray:
        """Return the preference ranks of `count` evenly spaced members of each group with more than `min_size` members,
        ascending."""
        is_large = self.sizes > min_size
        step = np.arange(count) * self.sizes[is_large, None] // count
        return sort_unique(self.members[(self.first[is_large, None] + step).ravel()])


class GroupMemberships(NamedTuple):
    """An index from documents to the groups they are in. Documents without a group are not in it."""

    documents: ndarray
    """int32 (D): ranks, ascending."""
    offsets: ndarray
    """int64 (D+1): document `d` has the groups from `offsets[d]` to `offsets[d + 1]`."""
    groups: ndarray
    """int32: numbers of the groups, ascending for each document."""

    @classmethod
    def from_groups(cls, groups: DocumentGroups) -> GroupMemberships:
        order = np.argsort(groups.members, kind="stable")
        members = groups.members[order]
        starts = np.flatnonzero(np.diff(members, prepend=-1))
        group = np.repeat(np.arange(len(groups.sizes), dtype=np.int32), groups.sizes)[order]
        return cls(members[starts], np.append(starts, len(members)), group)

    def iter_blocks(self, costs: ndarray, budget: int, max_documents: int) -> Iterator[tuple[ndarray, ndarray]]:
        """Yield the groups of documents in blocks of at most `max_documents`, as arrays of preference ranks and of
        group numbers.

        Args:
            costs: cost of the document at each rank.
            budget: largest total cost of a block. A document that costs more is a block of its own.

        Yields:
            The rank of the document and the number of the group of each membership.
        """
        for start, end in split_by_budget(costs[self.documents], budget, max_documents):
            offsets = self.offsets[start : end + 1]
            yield np.repeat(self.documents[start:end], np.diff(offsets)), self.groups[offsets[0] : offsets[-1]]

    def select_documents(self, group_mask: ndarray) -> ndarray:
        """Return the preference ranks of the documents in any of the masked groups (bool (G)), ascending (int32)."""
        chosen_counts = np.diff(np.append(0, np.cumsum(group_mask[self.groups]))[self.offsets])
        return self.documents[chosen_counts > 0]

    def share_group(self, a: ndarray, b: ndarray) -> ndarray:
        """Return whether the documents at preference ranks `a` and `b` have a group in common, pair by pair (bool)."""
        slices = []
        for ranks in (a, b):
            rows = np.searchsorted(self.documents, ranks)
            slices += [self.groups, self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]]
        return count_shared_values(*slices, bits=32) > 0


def list_groups_with_equal_bands(
    preference_rank: ndarray, has_keys: ndarray, load_band: Callable[[int], ndarray], bands: int = BANDS
) -> DocumentGroups:
    """Group the documents that share a MinHash key in any band, and return each distinct group once.

    Equal groups are found by 64-bit hashes of their members. Among ten million groups, two different ones have the same
    hash in one of 4·10⁵ data sets.

    Args:
        preference_rank: position of each document in the order of preference, int32 (N), a permutation.
        has_keys: whether each document has keys, bool (N).
        load_band: band → keys of all documents, uint64 (N). It is called once for each band.
    """
    known_groups = NO_HASHES
    members = list[ndarray]()
    sizes = list[ndarray]()
    all_have_keys = bool(has_keys.all())
    for band in range(bands):
        keys = load_band(band)
        ranks, size = group_by_key(
            keys if all_have_keys else keys[has_keys],
            preference_rank if all_have_keys else preference_rank[has_keys],
        )
        if not len(size):
            continue
        # The addend makes the hash of rank 0 differ from 0, so that it changes a sum.
        rank_hashes = mix_bits_in_place(ranks.astype(np.uint64) * ODD_MULTIPLIER + ODD_MULTIPLIER)
        group_hashes = mix_bits_in_place(np.add.reduceat(rank_hashes, np.cumsum(size) - size))
        is_unseen = ~is_in_sorted(known_groups, group_hashes)
        members.append(ranks[np.repeat(is_unseen, size)])
        sizes.append(size[is_unseen])
        known_groups = np.sort(np.append(known_groups, group_hashes[is_unseen]))
    return DocumentGroups(concatenate(members, np.zeros(0, np.int32)), concatenate(sizes, NO_NUMBERS))


def group_by_key(keys: ndarray, preference_rank: ndarray) -> DocumentGroups:
    """Group the documents with equal keys. Documents with a unique key are in no group."""
    order = np.argsort(keys)
    sorted_keys = keys[order]
    repeats_previous = np.zeros(len(keys) + 1, bool)  # whether a key equals the one before
    np.equal(sorted_keys[1:], sorted_keys[:-1], out=repeats_previous[1:-1])
    is_shared = repeats_previous[1:] | repeats_previous[:-1]
    is_first = ~repeats_previous[:-1][is_shared]
    entries = np.cumsum(is_first, dtype=np.int64) << 32 | preference_rank[order[is_shared]]
    entries.sort()
    sizes = np.diff(np.append(np.flatnonzero(is_first), len(is_first)))
    return DocumentGroups((entries & 0xFFFFFFFF).astype(np.int32), sizes)


def split_into_packs(groups: DocumentGroups, costs: ndarray, count: int) -> list[ndarray]:
    """Split the documents of groups into at most `count` packs that can be deduplicated independently.

    Groups that have members in common, directly or through other groups, are in one pack, so a pack may be large.

    Args:
        groups: groups whose members are numbers of documents.
        costs: cost of each document.

    Returns:
        The numbers of each pack's documents, ascending (int64).
    """
    first = np.repeat(groups.members[groups.first], groups.sizes)
    labels = label_components(len(costs), first.astype(np.int64), groups.members.astype(np.int64))
    members = sort_unique(groups.members).astype(np.int64)
    heads, component = np.unique(labels[members], return_inverse=True)
    by_cost = np.argsort(-np.bincount(component, costs[members], len(heads)), kind="stable")
    pack = np.empty(len(heads), np.int64)
    pack[by_cost] = np.arange(len(heads)) % count
    return [members[pack[component] == number] for number in range(min(count, len(heads)))]


# --- Text that many documents share: instructions, templates, preambles. It does not count when documents are
# compared.
#
# Documents with a band's key in common are a group. A shingle is *shared* if half of a group of at least
# `MIN_SHARED_GROUP` documents have it. Templates may be nested (a preamble of all rows, an instruction of some), so one
# group for each document is not enough: of the groups of each document, the largest of every size class (powers of two)
# is counted. A template that more than half of a larger family has is shared in that family's group. Any other template
# has groups of a lower class. In a large group only a sample is counted. It depends on the documents' content and not
# on their order.

MIN_SHARED_GROUP = 16
"""Minimum number of documents in a group whose common shingles may count as shared text."""
SAMPLE_SIZE = 64
"""Maximum number of documents in a group whose shingles are counted."""
SHARED_FRACTION = 0.5
"""Minimum share of the counted documents that must have a shingle for it to count as shared text."""
MIN_OWN_SHINGLES = 24
"""Minimum number of shingles that a document must have beside shared text. Documents with fewer are duplicates only if
their sets are equal."""
BLOCK_GROUPS = 1 << 64 - HASH_BITS
"""Maximum number of groups that are counted together."""
BLOCK_SHINGLES = 1 << 22
"""Maximum number of shingles that are in memory together."""


def find_shared_shingles(
    groups: DocumentGroups,
    index: ndarray,
    sizes: ndarray,
    content: ndarray,
    load_shingles: Callable[[ndarray], Shingles],
) -> ndarray:
    """Return the shingles of text that many documents share, such as a template; uint64, ascending.

    Args:
        groups: groups whose members are ranks.
        index: the document at each rank, int64 (N).
        sizes: number of shingles of each document (N).
        content: hash of each document's content, uint64 (N). Those with the smallest hashes are sampled.
        load_shingles: loads the shingles of documents (int64, ascending).
    """
    shared = NO_HASHES
    samples = [index[members] for members in iter_group_samples(groups, content[index])]
    costs = np.array([sizes[documents].sum(dtype=np.int64) for documents in samples], np.int64)
    for start, end in split_by_budget(costs, BLOCK_SHINGLES, BLOCK_GROUPS):
        documents = sort_unique(np.concatenate(samples[start:end]))
        sets = load_shingles(documents)
        counted = [find_common_shingles(sets, np.searchsorted(documents, sample)) for sample in samples[start:end]]
        shared = sort_unique(concatenate(counted, shared))
    return shared


def find_common_shingles(sets: Shingles, rows: ndarray) -> ndarray:
    """Return the shingles (uint64) that at least a share `SHARED_FRACTION` of the documents `rows` contain."""
    values = np.sort(np.concatenate([sets.values[sets.offsets[row] : sets.offsets[row + 1]] for row in rows]))
    required = int(np.ceil(SHARED_FRACTION * len(rows)))
    if required > len(values):
        return NO_HASHES
    return sort_unique(values[required - 1 :][values[required - 1 :] == values[: len(values) - required + 1]])


def iter_group_samples(groups: DocumentGroups, content: ndarray) -> Iterator[ndarray]:
    """Yield the members of each group to be counted, and of a group above `SAMPLE_SIZE` only the members with the
    smallest content hashes. These are `SAMPLE_SIZE` members, and members whose hash equals the last of these. A group
    is counted if it has at least `MIN_SHARED_GROUP` members and is the largest of its size class (powers of two) for
    one of them.

    Args:
        content: content hash of the document at each rank.
    """
    starts = groups.first
    classes = np.frexp(groups.sizes.astype(np.float64))[1]
    large = groups.sizes >= MIN_SHARED_GROUP
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
                yield (
                    members
                    if size <= SAMPLE_SIZE
                    else members[hashes <= np.partition(hashes, SAMPLE_SIZE - 1)[SAMPLE_SIZE - 1]]
                )


BLOCK = 1 << 12
"""Maximum number of documents that are decided together."""
SKETCHED_GROUP = 8
"""Size of a group above which its members get sketches, each of which costs as much as some comparisons."""
LARGE_GROUP = 64
"""Size of a group above which its members are compared by rare shingles."""
RARITY_SAMPLE = 32
"""Number of members of a large group from which frequencies of shingles are estimated."""
WHOLE_SET_BIT = np.uint64(1 << 62)
"""A bit that is set in every mark that is a hash of a whole set, and in no mark that is a group."""

LoadShingles = Callable[[ndarray], Shingles]


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

    def renumber(self, numbers: ndarray) -> Duplicates:
        """Return the duplicates with each document number `i` replaced by `numbers[i]`, int64 (N)."""
        return self._replace(dropped=numbers[self.dropped], kept=numbers[self.kept])


def find_exact(
    digests: ndarray, preference: ndarray, sources: ndarray | None = None, only_across_sources: bool = False
) -> Duplicates:
    """Return the documents to drop because their digest equals that of a more preferred document, each with the
    document to keep.

    Args:
        digests: N digests of 16 bytes (`digest_normalised_texts`).
        preference, sources, only_across_sources: as for `find_near`.
    """
    halves = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)
    source_keys = sources if sources is not None and not only_across_sources else np.zeros(len(preference), np.int64)
    # The sort is stable: documents of equal preference stay in order.
    sorted_rows = np.lexsort((preference, source_keys, halves[:, 1], halves[:, 0]))
    is_first = differs_from_previous(*(key[sorted_rows] for key in (halves[:, 0], halves[:, 1], source_keys)))
    kept = sorted_rows[is_first][np.cumsum(is_first) - 1]
    is_dropped = ~is_first
    if sources is not None and only_across_sources:
        is_dropped &= sources[sorted_rows] != sources[kept]
    dropped = sorted_rows[is_dropped]
    kept = kept[is_dropped]
    by_preference = np.lexsort((dropped, preference[dropped]))
    exact = np.ones(len(dropped), bool)
    return Duplicates(dropped[by_preference], kept[by_preference], exact.astype(np.float64), exact)


def find_near(
    preference: ndarray,
    sizes: ndarray,
    load_band: Callable[[int], ndarray],
    load_shingles: LoadShingles,
    threshold: float = 0.7,
    bands: int = BANDS,
    sources: ndarray | None = None,
    only_across_sources: bool = False,
    numbers: ndarray | None = None,
    content: ndarray | None = None,
    shared: ndarray | None = None,
) -> Duplicates:
    """Find the documents to drop because they are near-duplicates of a more preferred document that is kept.

    Args:
        preference: preference of each document, int64 (N). The document with the lower number is kept; of equal
            numbers the first document.
        sizes: number of shingles of each document, integers (N). A document without shingles has no keys and is kept.
        load_band: band → keys of all documents in that band (`compute_band_keys`), uint64 (N). It is called once for
            each band.
        load_shingles: loads the shingles of documents (int64, ascending).
        threshold: least Jaccard similarity of near-duplicates, in (0, 1], exact on hashed shingles (`Shingles`).
        sources: source of each document, integers (N). If given, only documents of the same source are compared.
        only_across_sources: compare only documents of different sources instead.
        numbers: hash of each document's numbers and operators (`hash_numbers`), uint64 (N). None ignores these.
        content: hash of each document's content, uint64 (N), by which shared text is found (`find_shared_shingles`).
        shared: the shared shingles, ascending, if the caller has them. Without it and `content`, no text is shared.
    """
    documents = RankedDocuments(np.argsort(preference, kind="stable"), sizes, load_shingles)
    rank = np.empty(len(preference), np.int32)
    rank[documents.index] = np.arange(len(preference), dtype=np.int32)
    groups = list_groups_with_equal_bands(rank, sizes > 0, load_band, bands)
    if shared is None:
        shared = (
            NO_HASHES
            if content is None
            else find_shared_shingles(groups, documents.index, sizes, content, load_shingles)
        )
    memberships = GroupMemberships.from_groups(groups)
    is_large_group = groups.sizes > LARGE_GROUP
    rarity = ShingleRarity(shared)
    for _, sets in documents.iter_sets(groups.sample_members(LARGE_GROUP, RARITY_SAMPLE)):
        rarity.add(sets)

    def compute_similarity(earlier: ndarray, later: ndarray) -> ndarray:
        a = documents.index[earlier]
        b = documents.index[later]
        max_similarity = np.minimum(sizes[a], sizes[b]) / np.maximum(sizes[a], sizes[b])
        is_candidate = max_similarity >= threshold
        if sources is not None:
            is_candidate &= (sources[a] != sources[b]) == only_across_sources
        if numbers is not None:
            is_candidate &= numbers[a] == numbers[b]
        is_candidate[is_candidate] = sketches.might_reach(
            earlier[is_candidate], later[is_candidate], sizes[a[is_candidate]] + sizes[b[is_candidate]], threshold
        )
        similarity = np.zeros(len(a))
        similarity[is_candidate] = documents.compute_similarities(a[is_candidate], b[is_candidate], threshold, shared)
        reaching = np.flatnonzero(similarity >= threshold)
        # Documents may share a rare shingle, but no key.
        share_no_group = ~memberships.share_group(earlier[reaching], later[reaching])
        similarity[reaching[share_no_group]] = 0
        return similarity

    sketches = SetSketches(memberships.select_documents(groups.sizes > min(SKETCHED_GROUP, LARGE_GROUP)))
    del groups  # takes as much memory as the memberships
    greedy = GreedySelection(compute_similarity, threshold)

    def mark(ranks: ndarray, group: ndarray) -> MarkTable:
        """Return the marks (groups, rare shingles) by which documents are compared, and add the documents' sketches to
        `sketches`.

        In large groups, near-duplicates have a rare shingle in common that is not shared text, or the same set.

        Args:
            ranks, group: document and group of each membership.
        """
        of_large = is_large_group[group]
        marks = [group[~of_large].astype(np.uint64)]
        owners = [ranks[~of_large]]
        large_members = sort_unique(ranks[of_large])
        for members, sets in documents.iter_sets(sort_unique(ranks[is_in_sorted(sketches.ranks, ranks)])):
            sketches.add(members, sets)
            in_large_group = is_in_sorted(large_members, members)
            members = members[in_large_group]
            sets = sets.select(in_large_group)
            rare, set_of_mark = rarity.select_marks(sets, threshold)
            marks.append(rare)
            owners.append(members[set_of_mark])
            if len(shared):
                marks.append(hash_sets(sets))
                owners.append(members)
        return MarkTable.from_entries(np.concatenate(marks), np.concatenate(owners))

    for ranks, group in memberships.iter_blocks(sizes[documents.index], 2 * BLOCK_SHINGLES, BLOCK):
        greedy.decide_block(mark(ranks, group))
    kept, dropped, similarity = concatenate_columns(greedy.pairs)
    by_rank = np.argsort(dropped)
    exact = np.zeros(len(by_rank), bool)
    duplicates = Duplicates(dropped[by_rank], kept[by_rank], similarity[by_rank], exact)
    return duplicates.renumber(documents.index)


def hash_sets(sets: Shingles) -> ndarray:
    """Hash each set of shingles to one number with `WHOLE_SET_BIT` set, uint64 (N). No set may be empty."""
    if not len(sets):
        return NO_HASHES
    sums = np.add.reduceat(mix_bits_in_place(sets.values * ODD_MULTIPLIER + ODD_MULTIPLIER), sets.offsets[:-1])
    return mix_bits_in_place(sums) >> np.uint64(2) | WHOLE_SET_BIT


@dataclass(frozen=True)
class RankedDocuments:
    """Access to the shingles of documents by their rank in the order of preference."""

    index: ndarray
    """int64 (N): number of the document at each rank."""
    sizes: ndarray
    """Number of shingles of each document."""
    load_shingles: LoadShingles

    def iter_sets(self, ranks: ndarray) -> Iterator[tuple[ndarray, Shingles]]:
        """Yield the documents at `ranks` in blocks of bounded size, as an array of ranks and their sets of shingles.
        They are in the order of document numbers."""
        ranks = ranks[np.argsort(self.index[ranks])]
        for start, end in split_by_budget(self.sizes[self.index[ranks]], BLOCK_SHINGLES, BLOCK_DOCUMENTS):
            yield ranks[start:end], self.load_shingles(self.index[ranks[start:end]])

    def compute_similarities(self, a: ndarray, b: ndarray, threshold: float, shared: ndarray) -> ndarray:
        """Return the Jaccard similarity of each pair of documents, or 0 if only shared text makes them similar, float64
        (pairs). `a` and `b` are numbers of documents."""
        similarities = np.zeros(len(a))
        for start, end in split_by_budget(self.sizes[a].astype(np.int64) + self.sizes[b], BLOCK_SHINGLES, len(a)):
            documents = sort_unique(np.append(a[start:end], b[start:end]))
            rows_a = np.searchsorted(documents, a[start:end])
            rows_b = np.searchsorted(documents, b[start:end])
            similarities[start:end] = compare_sets(self.load_shingles(documents), rows_a, rows_b, threshold, shared)
        return similarities


def compare_sets(sets: Shingles, a: ndarray, b: ndarray, threshold: float, shared: ndarray) -> ndarray:
    """Return the Jaccard similarity of each pair of sets, or 0 if it reaches the threshold by shared text only,
    float64. The sets are given by their rows in `sets`.

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
    shared_sets = sets.select(is_used).intersect(shared)
    row_of_set = np.cumsum(is_used) - 1
    common_shared = count_common(shared_sets, row_of_set[a], shared_sets, row_of_set[b])
    is_similar_otherwise = ((common - common_shared) >= threshold * (union - common_shared)) & (
        smaller_size - common_shared >= MIN_OWN_SHINGLES
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
"""Maximum number of candidate pairs that are compared together."""
FEW_PAIRS = 1 << 14
"""Number of candidate pairs of a block up to which all of them are compared, without splitting the block."""
MAX_MERGED_RUN = 1 << 22
"""Number of marks above which a table of kept documents is not merged with others any more, because merging doubles its
memory."""
NO_PAIRS = (NO_NUMBERS, NO_NUMBERS, np.zeros(0))
"""An empty list of pairs: earlier documents, later documents, similarities."""


@dataclass(frozen=True)
class MarkTable:
    """Pairs of a mark (a group or a rare shingle) and a document that has it, sorted by mark and then by document."""

    mark: ndarray
    """uint64."""
    document: ndarray
    """int32: rank in the order of preference."""

    @classmethod
    def from_entries(cls, mark: ndarray, document: ndarray) -> MarkTable:
        order = np.lexsort((document, mark))
        return cls(mark[order], document[order])

    def __len__(self) -> int:
        return len(self.mark)

    def select(self, mask: ndarray) -> MarkTable:
        return MarkTable(self.mark[mask], self.document[mask])

    def drop_documents(self, documents: ndarray) -> MarkTable:
        """Return the table without the entries of the given documents, which are ascending."""
        return self.select(~is_in_sorted(documents, self.document)) if len(documents) else self

    def merge(self, other: MarkTable) -> MarkTable:
        return MarkTable.from_entries(np.append(self.mark, other.mark), np.append(self.document, other.document))

    def find_equal_marks(self, other: MarkTable) -> tuple[ndarray, ndarray]:
        """Return for each entry of `other` the index of the first entry with the same mark in this table, and the
        number of these entries."""
        begins = np.searchsorted(self.mark, other.mark)
        return begins, np.searchsorted(self.mark, other.mark, "right") - begins


class GreedySelection:
    """Deduplication that keeps or drops documents in order of preference, comparing each one with the kept documents
    before it.

    Args:
        compute_similarity: computes the similarity of earlier and later documents, pair by pair, from their ranks. It
            is below the threshold for pairs that must not count as near-duplicates.
    """

    def __init__(self, compute_similarity: Callable[[ndarray, ndarray], ndarray], threshold: float) -> None:
        self.compute_similarity = compute_similarity
        self.threshold = threshold
        self.kept: list[
            MarkTable
        ] = []  # runs, each at least four times as long as the next one, or of `MAX_MERGED_RUN`
        self.pairs: list[tuple[ndarray, ndarray, ndarray]] = [NO_PAIRS]  # kept, dropped, similarity

    def decide_block(self, block: MarkTable) -> None:
        """Keep or drop each document of the next block in order of preference, and record the kept and the dropped
        documents."""
        self.kept.append(self.deduplicate_block(self.drop_similar(self.kept, block)))
        while len(self.kept) > 1 and len(self.kept[-2]) < min(4 * len(self.kept[-1]), MAX_MERGED_RUN):
            last = self.kept.pop()
            self.kept[-1] = self.kept[-1].merge(last)

    def deduplicate_block(self, block: MarkTable) -> MarkTable:
        """Drop and record the duplicates within a block, and return the entries of the documents that are kept. The
        documents may be similar to none of an earlier block."""
        compares_all = int(block.find_equal_marks(block)[1].sum()) <= FEW_PAIRS + len(block)
        documents = sort_unique(block.document)
        if compares_all or len(documents) == 1:
            return self.drop_similar([block], block)
        is_first = block.document < float(np.median(documents))
        first = self.deduplicate_block(block.select(is_first))
        return first.merge(self.deduplicate_block(self.drop_similar([first], block.select(~is_first))))

    def drop_similar(self, earlier: Sequence[MarkTable], later: MarkTable) -> MarkTable:
        """Drop each later document that is similar to a kept earlier one, record the pair, and return the other later
        documents' entries. The earlier document of a pair is the first one that is similar."""
        columns = [NO_PAIRS]
        for earlier_ranks, later_ranks in iter_candidate_pairs(earlier, later):
            similarity = self.compute_similarity(earlier_ranks, later_ranks)
            is_similar = similarity >= self.threshold
            columns.append((earlier_ranks[is_similar], later_ranks[is_similar], similarity[is_similar]))
        kept, dropped, similarity = concatenate_columns(columns)
        order = np.lexsort((kept, dropped))
        dropped_rows: dict[int, int] = {}
        for row, earlier_rank, later_rank in zip(
            order.tolist(), kept[order].tolist(), dropped[order].tolist(), strict=True
        ):
            if earlier_rank not in dropped_rows and later_rank not in dropped_rows:
                dropped_rows[later_rank] = row
        rows = np.fromiter(dropped_rows.values(), np.int64, len(dropped_rows))
        self.pairs.append((kept[rows], dropped[rows], similarity[rows]))
        return later.drop_documents(dropped[rows])


def iter_candidate_pairs(earlier: Sequence[MarkTable], later: MarkTable) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield the pairs of documents with a mark in common in blocks, as arrays of the earlier and of the later
    document's rank."""
    pairs = NO_NUMBERS
    for table in earlier:
        begins, counts = table.find_equal_marks(later)
        for start, end in split_by_budget(counts, BLOCK_PAIRS, max(len(counts), 1)):
            earlier_ranks = table.document[concatenate_ranges(begins[start:end], counts[start:end])].astype(np.int64)
            later_ranks = np.repeat(later.document[start:end], counts[start:end]).astype(np.int64)
            pairs = sort_unique(np.append(pairs, (later_ranks << 32 | earlier_ranks)[earlier_ranks < later_ranks]))
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
"""Number of pairs that are compared at once, so few that they stay in a core's cache."""


class SetSketches:
    """Bitmaps of sets that bound their similarity: bit `i` is the parity of the number of shingles whose lowest bits
    are `i`.

    Args:
        ranks: ranks of the documents that will have a sketch, ascending.
    """

    def __init__(self, ranks: ndarray) -> None:
        self.ranks = ranks
        self.bits = np.zeros((len(ranks), BITS // 64), np.uint64)

    def add(self, ranks: ndarray, sets: Shingles) -> None:
        """Compute and store the sketches of the documents at `ranks` from their sets of shingles, at most 1,024 at a
        time."""
        bit = (sets.values & np.uint64(BITS - 1)).astype(np.int64)
        parity = np.bincount(sets.owners * BITS + bit, minlength=len(sets) * BITS) & 1
        packed = np.packbits(parity.astype(bool).reshape(len(sets), BITS), axis=1)
        self.bits[np.searchsorted(self.ranks, ranks)] = packed.view(np.uint64)

    def might_reach(self, a: ndarray, b: ndarray, sizes: ndarray, threshold: float) -> ndarray:
        """Return whether the similarity of the documents at ranks `a` and `b` may reach the threshold, pair by pair
        (bool).

        Two sets differ by at least as many shingles as their sketches have different bits.

        Args:
            sizes: total number of shingles of both documents of each pair.
        """
        may_be_similar = np.ones(len(a), bool)
        if not len(self.ranks):
            return may_be_similar
        # J is below the threshold if sets differ by more.
        max_difference = sizes * ((1 - threshold) / (1 + threshold)) * (1 + 1e-9)
        for start in range(0, len(a), AT_ONCE):
            span = slice(start, start + AT_ONCE)
            rows_a, rows_b = (np.searchsorted(self.ranks[:-1], ranks[span]) for ranks in (a, b))
            has_sketches = (self.ranks[rows_a] == a[span]) & (self.ranks[rows_b] == b[span])
            differing_bits = np.bitwise_count(self.bits[rows_a] ^ self.bits[rows_b]).sum(1, dtype=np.int64)
            may_be_similar[span] = ~has_sketches | (differing_bits <= max_difference[span])
        return may_be_similar
