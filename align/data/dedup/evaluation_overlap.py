"""Contamination: training texts that overlap with the texts of evaluation sets.

A training text is a hit of an evaluation text by one of three rules. The first one that holds is reported:

- `EXACT`: both have the same words, numbers and operators in the same order, and fewer words than `width`.
- `NGRAM`: they have a run of `width` words in common (13, as in Brown et al. 2020, arXiv 2005.14165, appendix C).
- `NEAR`: the Jaccard similarity of their word 3-shingles reaches the threshold, and they have the same numbers and
  operators.

Each rule finds every such pair. `NEAR` needs no MinHash, because prefix filtering (`ShingleRarity`) leaves few pairs. A
text without words is never a hit. `align.data.dedup.shingles` defines words.

If one index cannot hold all evaluation texts, they are indexed a slice at a time, and a `Prefilter` finds the training
texts that have anything in common with any of them. It reads training texts twice, regardless of the number of slices:
once to find the runs of words that are so common that they are phrases, and once to find the texts that have anything
else in common with evaluation texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy import ndarray

from align.data.dedup.arrays import (
    NO_HASHES,
    NO_NUMBERS,
    BloomFilter,
    HashTable,
    Texts,
    concatenate,
    concatenate_columns,
    concatenate_ranges,
    differs_from_previous,
    is_in_sorted,
)
from align.data.dedup.numbers import hash_numbers
from align.data.dedup.shingles import (
    ODD_MULTIPLIER,
    ShingleRarity,
    Shingles,
    build_block_shingles,
    compute_jaccard,
    hash_block_words,
    iter_byte_blocks,
    mix_bits_in_place,
)

RULES = ("question", "exact", "ngram", "contained", "near", "changed")
"""Names of all overlap rules in order of precedence: if several hold for two texts, the first one is reported.
`question` means that both texts ask the same, see `align.data.dedup.questions`; the module's docstring defines the
others."""
ASKED, EXACT, NGRAM, CONTAINED, NEAR, CHANGED = range(len(RULES))
MAX_RUN_ROWS = 10
"""Maximum number of training rows with the same run of `WIDTH` words for the run to count. A run in more of them is a
common phrase or boilerplate (Brown et al. 2020, arXiv 2005.14165, appendix C)."""
WIDTH = 13
"""Number of consecutive words in common with an evaluation text that makes a training row a hit."""
SLICE_BYTES = 48 << 20
"""Bytes of text that are indexed at once."""
OwnedHashes = tuple[ndarray, ndarray]
"""Hashes (uint64), and the number of the text that each comes from (int32)."""


class OverlapMatches(NamedTuple):
    """Pairs of a training text and an evaluation row that overlap, with the rule that found each pair.

    Attributes:
        text: number of the training text, int64. For a spool, number of its row.
        evaluation: number of the evaluation set, int64.
        row: number of the row in that set, from 0, int64.
        rule: index of the rule in `RULES`, int64.
    """

    text: ndarray
    evaluation: ndarray
    row: ndarray
    rule: ndarray


@dataclass(frozen=True)
class TextFeatures:
    """Hashes of a block of texts, by which overlaps with other texts are found. Owners are places of texts in the
    block."""

    short: ndarray
    """uint64: hash of each whole text that has fewer words than a run."""
    short_owners: ndarray
    grams: Shingles
    """Hashed runs of `width` words of each text."""
    shingles: Shingles
    """Hashed word 3-shingles of each text. All sets are empty if near-duplicates are not searched."""
    numbers: ndarray
    """uint64: hash of the numbers and operators of each text (`hash_numbers`)."""

    @classmethod
    def from_block(cls, data: ndarray, starts: ndarray, numbers: ndarray, width: int, near: bool) -> TextFeatures:
        hashes, counts = hash_block_words(data, starts)
        short_texts = np.flatnonzero((counts > 0) & (counts < width))
        first = (np.cumsum(counts) - counts)[short_texts]
        hashes_of_short = counts[short_texts].astype(np.uint64)
        for word in range(width - 1):
            has_word = counts[short_texts] > word
            hashes_of_short[has_word] = mix_bits_in_place(
                hashes_of_short[has_word] * ODD_MULTIPLIER + hashes[first[has_word] + word]
            )
        hashes_of_short ^= numbers[short_texts]
        shingles = build_block_shingles(hashes, counts, 3) if near else Shingles.from_sizes(NO_HASHES, 0 * counts)
        return cls(hashes_of_short, short_texts, build_block_shingles(hashes, counts, width), shingles, numbers)


def iter_features(texts: Texts, width: int, near: bool) -> Iterator[TextFeatures]:
    """Yield the hashes of texts that the overlap rules compare, block by block.

    Args:
        width: words of a run.
        near: whether near-duplicates are searched.
    """
    numbers = hash_numbers(texts)
    start = 0
    for data, starts in iter_byte_blocks(texts):
        end = start + len(starts) - 1
        yield TextFeatures.from_block(data, starts, numbers[start:end], width, near)
        start = end


class OverlapIndex:
    """An index of the texts of evaluation sets, in which `find_overlapping_texts` looks up training texts.

    It takes some 5 bytes for a byte of text, and 7 while it is built.

    Args:
        evaluations: the texts of each set. A row may have several texts.
        width: words of a run, at least 3.
        threshold: least Jaccard similarity, in (0, 1]. None if near-duplicates are not searched.
        rows: row of each text of all sets, int64, ascending in each set. None if each text is a row of its own.
    """

    def __init__(
        self,
        evaluations: Sequence[Texts],
        width: int = WIDTH,
        threshold: float | None = 0.7,
        rows: ndarray | None = None,
    ) -> None:
        self.width = width
        self.threshold = threshold
        counts = np.array([len(texts) for texts in evaluations], np.int64)
        self.evaluation = np.repeat(np.arange(len(counts)), counts)
        self.row = concatenate_ranges(0 * counts, counts) if rows is None else rows
        self.rarity = ShingleRarity()
        first_text = 0
        short = list[OwnedHashes]()
        grams = list[OwnedHashes]()
        sets = [Shingles.from_sizes(NO_HASHES, NO_NUMBERS)]
        numbers = [NO_HASHES]
        for texts in evaluations:
            for part in iter_features(texts, width, threshold is not None):
                short.append((part.short, (part.short_owners + first_text).astype(np.int32)))
                grams.append((part.grams.values, (part.grams.owners + first_text).astype(np.int32)))
                sets.append(part.shingles)
                numbers.append(part.numbers)
                self.rarity.add(part.shingles)
                first_text += len(part.grams)
        self.short = index_hashes(short, self.evaluation)
        self.grams = index_hashes(grams, self.evaluation)
        self.numbers = np.concatenate(numbers)
        marks = list[OwnedHashes]()
        first_text = 0
        for shingles in sets if threshold is not None else ():  # block by block
            mark, owner = self.rarity.select_marks(shingles, threshold or 0)
            marks.append((mark, (owner + first_text).astype(np.int32)))
            first_text += len(shingles)
        self.mark_table = index_hashes(marks)
        self.shingles = Shingles.from_sizes(
            *concatenate_columns((shingles.values, shingles.sizes) for shingles in sets)
        )

    def copy_without_runs(self, runs: ndarray) -> OverlapIndex:
        """Return a copy of the index without the given runs of words, such as phrases that many training texts have.

        Args:
            runs: hashes of these runs, uint64, ascending.
        """
        index = copy(self)
        is_kept = ~is_in_sorted(runs, self.grams.hashes)
        index.grams = HashTable(self.grams.hashes[is_kept], self.grams.owners[is_kept])
        return index

    def find_near(self, block: TextFeatures) -> tuple[ndarray, ndarray]:
        """Return pairs of a text in the block and an evaluation text whose similarity reaches the threshold and whose
        numbers and operators are the same.

        Returns:
            Places of texts in the block, and the numbers of evaluation texts, pair by pair.
        """
        sets = block.shingles
        if self.threshold is None:
            return NO_NUMBERS, NO_NUMBERS
        texts, evaluation_texts = self.mark_table.find_pairs(*self.rarity.select_marks(sets, self.threshold))
        has_same_numbers = block.numbers[texts] == self.numbers[evaluation_texts]
        texts = texts[has_same_numbers]
        evaluation_texts = evaluation_texts[has_same_numbers]
        is_similar = compute_jaccard(sets, texts, self.shingles, evaluation_texts) >= self.threshold
        return texts[is_similar], evaluation_texts[is_similar]


def index_hashes(parts: list[OwnedHashes], set_of_owner: ndarray | None = None) -> HashTable:
    """Build a lookup from hashes to the numbers of the texts that have them, and empty `parts` to save memory.

    Args:
        parts: pieces of the table, with ascending owners. The list is emptied to save memory.
        set_of_owner: set of each owner. Only the first owner of a hash in each set is kept. None keeps all owners.
    """
    values, owners = concatenate_columns([(NO_HASHES, np.zeros(0, np.int32)), *parts])
    parts.clear()
    order = np.argsort(values, kind="stable")  # owners of equal hashes stay in order
    values = values[order]
    owners = owners[order]
    del order
    if set_of_owner is None:
        return HashTable(values, owners)
    is_first = differs_from_previous(values, set_of_owner[owners])
    return HashTable(values[is_first], owners[is_first])


def find_overlapping_texts(index: OverlapIndex, texts: Texts) -> OverlapMatches:
    """Return the training texts that overlap with evaluation sets, each with the evaluation row and the rule that
    holds. They are sorted by text and then by set.

    There is at most one match for each text and set: the first row that the first rule with any match finds.
    """
    columns = [(NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)]  # text, evaluation text, rule
    first_text = 0
    for block in iter_features(texts, index.width, index.threshold is not None):
        by_rule = {
            EXACT: index.short.find_pairs(block.short, block.short_owners),
            NGRAM: index.grams.find_pairs(block.grams.values, block.grams.owners),
            NEAR: index.find_near(block),
        }
        columns += [(text + first_text, owner, np.full(len(text), rule)) for rule, (text, owner) in by_rule.items()]
        first_text += len(block.grams)
    text, owner, rule = concatenate_columns(columns)
    evaluation = index.evaluation[owner]
    order = np.lexsort((owner, rule, evaluation, text))
    text = text[order]
    evaluation = evaluation[order]
    owner = owner[order]
    rule = rule[order]
    is_first = differs_from_previous(text, evaluation)
    return OverlapMatches(text[is_first], evaluation[is_first], index.row[owner[is_first]], rule[is_first])


class HashCounter:
    """A counter of how often each hash was added, exact up to 255. A hash takes 9 bytes, and 17 while counts are
    merged."""

    LEAST = 1 << 20
    """Minimum number of new hashes that are merged at once. A quarter of the counted ones if that is more, so that
    these are copied only a few times."""

    def __init__(self) -> None:
        self.hashes = NO_HASHES
        self.counts = np.zeros(0, np.uint8)
        self._new = list[ndarray]()
        self._new_count = 0

    def add(self, hashes: ndarray) -> None:
        self._new.append(hashes)
        self._new_count += len(hashes)
        if self._new_count >= max(self.LEAST, len(self.hashes) // 4):
            self._merge_new()

    def _merge_new(self) -> None:
        hashes, counts = np.unique(concatenate(self._new, NO_HASHES), return_counts=True)
        self._new = []
        self._new_count = 0
        places = np.searchsorted(self.hashes, hashes)
        is_counted = is_in_sorted(self.hashes, hashes)
        self.counts[places[is_counted]] = np.minimum(self.counts[places[is_counted]] + counts[is_counted], 255)
        self.hashes = np.insert(self.hashes, places[~is_counted], hashes[~is_counted])
        self.counts = np.insert(self.counts, places[~is_counted], np.minimum(counts[~is_counted], 255))

    def select_above(self, max_count: int) -> ndarray:
        """Return the hashes that were added more than `max_count` times, ascending.

        Args:
            max_count: below 255.
        """
        self._merge_new()
        return self.hashes[self.counts > max_count]


class Prefilter:
    """A Bloom filter that finds the training texts that may overlap with evaluation texts, in a few bytes per word of
    the evaluation texts.

    Call `count_hashes` and then `add_evaluation_texts` with all evaluation texts, `match_and_count` with all training
    texts, and `match_without_phrases` with the ones that `match_and_count` finds.

    Args:
        threshold: as for `OverlapIndex`.
    """

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self._rarity = ShingleRarity()
        self._size = 0
        self._runs = HashCounter()

    def count_hashes(self, texts: Texts) -> None:
        """Count the hashes of evaluation texts, which sets the size of the filter, and estimate how rare their shingles
        are."""
        for block in self._iter_features(texts):
            self._rarity.add(block.shingles)
            self._size += len(block.grams.values) + len(self._collect_other_hashes(block)[0])

    @cached_property
    def _filter(self) -> BloomFilter:
        return BloomFilter(self._size)

    def add_evaluation_texts(self, texts: Texts) -> None:
        """Add the hashes of evaluation texts to the Bloom filter. `count_hashes` has to count all of them before."""
        for block in self._iter_features(texts):
            self._filter.add(spread_bits(block.grams.values))
            self._filter.add(spread_bits(self._collect_other_hashes(block)[0]))

    def match_and_count(self, texts: Texts) -> ndarray:
        """Return whether each training text may share a hash with the evaluation texts, bool (N), and count the shared
        runs of words. `phrases` are found from these counts.

        There are false positives and no false negatives.
        """

        def count(runs: ndarray) -> ndarray:
            self._runs.add(runs)
            return np.ones(len(runs), bool)

        return self._match_texts(texts, count)

    @cached_property
    def phrases(self) -> ndarray:
        """Hashes of runs of words that more than `MAX_RUN_ROWS` training texts share with evaluation texts, uint64,
        ascending. Read it after `match_and_count` has seen all of them."""
        return self._runs.select_above(MAX_RUN_ROWS)

    def match_without_phrases(self, texts: Texts) -> ndarray:
        """Return whether each training text may overlap with evaluation texts if runs of words in `phrases` do not
        count, bool (N). There are false positives and no false negatives."""
        return self._match_texts(texts, lambda runs: ~is_in_sorted(self.phrases, runs))

    def _match_texts(self, texts: Texts, counts: Callable[[ndarray], ndarray]) -> ndarray:
        """Return whether each text may share a hash with the evaluation texts, bool (N), except for runs of words that
        `counts` rejects.

        Args:
            counts: runs of words in common → whether each counts.
        """
        parts = [np.zeros(0, bool)]
        for block in self._iter_features(texts):
            is_alike = np.zeros(len(block.grams), bool)
            is_shared = self._filter.might_contain(spread_bits(block.grams.values))
            is_alike[block.grams.owners[is_shared][counts(block.grams.values[is_shared])]] = True
            other_hashes, owners = self._collect_other_hashes(block)
            is_alike[owners[self._filter.might_contain(spread_bits(other_hashes))]] = True
            parts.append(is_alike)
        return np.concatenate(parts)

    def _iter_features(self, texts: Texts) -> Iterator[TextFeatures]:
        return iter_features(texts, WIDTH, self.threshold is not None)

    def _collect_other_hashes(self, block: TextFeatures) -> tuple[ndarray, ndarray]:
        """Return the hashes of short texts and of rare shingles in a block, and the place in the block of each hash's
        text. Without a threshold, there are no shingles."""
        if self.threshold is None:
            return block.short, block.short_owners
        marks, owners = self._rarity.select_marks(block.shingles, self.threshold)
        return np.append(block.short, marks), np.append(block.short_owners, owners)


def spread_bits(hashes: ndarray) -> ndarray:
    """Return hashes with their bits mixed over all 64, as a Bloom filter needs. Hashes of runs of words have 54
    bits."""
    return mix_bits_in_place(hashes.copy())
