"""Contamination: which training texts hold what a model is to be evaluated on.

A training text is a hit of an evaluation text by one of three rules, the first that holds being the one that is named:

- `EXACT`: both have the same words, numbers and operators in the same order, and fewer words than `width`.
- `NGRAM`: they have a run of `width` words in common (13, as in Brown et al. 2020, arXiv 2005.14165, appendix C).
- `NEAR`: the Jaccard similarity of their word 3-shingles reaches the threshold, and they have the same numbers and
  operators.

Each rule finds every such pair. The last one needs no MinHash, because prefix filtering (`Rarity`) leaves few pairs. A
text without words is never a hit. `align.data.dedup.shingles` says what a word is.

Where one index cannot hold all evaluation texts, they are indexed a slice at a time, and a `Prefilter` tells which of
very many training texts have anything in common with any of them. So training texts are read twice, however many slices
there are: once to learn which runs of words are so common that they are phrases, and once to find the texts that have
anything else in common with evaluation texts.
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
    held,
    is_new,
    join,
    join_columns,
    ranges,
)
from align.data.dedup.numbers import number_hashes
from align.data.dedup.shingles import ODD, Rarity, Shingles, blocks, jaccard, mixed, shingles_of, word_hashes

RULES = ("question", "exact", "ngram", "contained", "near", "changed")
"""All rules, in the order in which they name a text that several hold for: these, those of
`align.data.dedup.questions`, and `question`, the text asks what an evaluation text asks."""
ASKED, EXACT, NGRAM, CONTAINED, NEAR, CHANGED = range(len(RULES))
COMMON = 10
"""Rows that may share a run of `WIDTH` words with a row: what more of them share is a common phrase or boilerplate
(Brown et al. 2020, arXiv 2005.14165, appendix C)."""
WIDTH = 13
"""Words of a run that gives a row away."""
SLICE = 48 << 20
"""Bytes of text that are indexed at once."""
Owned = tuple[ndarray, ndarray]
"""Hashes (uint64) and the numbers of the texts that have them (int32)."""


class Matches(NamedTuple):
    """Training texts, each with an evaluation row that it gives away.

    Attributes:
        text: the number of the training text, int64; of rows of a spool, that of the row.
        evaluation: the number of the evaluation set, int64.
        row: the number of the row in that set, from 0, int64.
        rule: the place of the rule in `RULES`, int64.
    """

    text: ndarray
    evaluation: ndarray
    row: ndarray
    rule: ndarray


@dataclass(frozen=True)
class Features:
    """What a block of texts is compared by. Owners are the places of texts in the block."""

    short: ndarray
    """uint64: hashes of the whole texts that have fewer words than a run."""
    short_owners: ndarray
    grams: Shingles
    """Runs of `width` words."""
    shingles: Shingles
    """None of any text if near-duplicates are not looked for."""
    numbers: ndarray
    """uint64: hashes of the numbers and operators of each text (`number_hashes`)."""

    @classmethod
    def of(cls, data: ndarray, starts: ndarray, numbers: ndarray, width: int, near: bool) -> Features:
        hashes, counts = word_hashes(data, starts)
        owners = np.flatnonzero((counts > 0) & (counts < width))
        first = (np.cumsum(counts) - counts)[owners]
        whole = counts[owners].astype(np.uint64)
        for word in range(width - 1):
            longer = counts[owners] > word
            whole[longer] = mixed(whole[longer] * ODD + hashes[first[longer] + word])
        whole ^= numbers[owners]
        shingles = shingles_of(hashes, counts, 3) if near else Shingles.of_sizes(NO_HASHES, 0 * counts)
        return cls(whole, owners, shingles_of(hashes, counts, width), shingles, numbers)


def iter_features(texts: Texts, width: int, near: bool) -> Iterator[Features]:
    """Yield the features of texts, block by block.

    Args:
        width: words of a run.
        near: whether near-duplicates are looked for.
    """
    numbers = number_hashes(texts)
    at = 0
    for data, starts in blocks(texts):
        end = at + len(starts) - 1
        yield Features.of(data, starts, numbers[at:end], width, near)
        at = end


class Index:
    """Evaluation sets, to be asked for the texts that are in them.

    A byte of their text takes some 5 bytes, and 7 while the index is made.

    Args:
        evaluations: the texts of each set. A row with several texts may give each.
        width: words of a run, at least 3.
        threshold: of the Jaccard similarity, in (0, 1]; None if near-duplicates are not looked for.
        rows: the row of each text of all sets, int64, ascending in each; None if each text is a row.
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
        self.row = ranges(0 * counts, counts) if rows is None else rows
        self.rarity = Rarity()
        at = 0
        short, grams = list[Owned](), list[Owned]()
        sets, numbers = [Shingles.of_sizes(NO_HASHES, NO_NUMBERS)], [NO_HASHES]
        for texts in evaluations:
            for part in iter_features(texts, width, threshold is not None):
                short.append((part.short, (part.short_owners + at).astype(np.int32)))
                grams.append((part.grams.values, (part.grams.owners + at).astype(np.int32)))
                sets.append(part.shingles)
                numbers.append(part.numbers)
                self.rarity.add(part.shingles)
                at += len(part.grams)
        self.short = index_hashes(short, self.evaluation)
        self.grams = index_hashes(grams, self.evaluation)
        self.numbers = np.concatenate(numbers)
        marks = list[Owned]()
        at = 0
        for some in sets if threshold is not None else ():  # texts that are looked at together
            mark, owner = self.rarity.marks(some, threshold or 0)
            marks.append((mark, (owner + at).astype(np.int32)))
            at += len(some)
        self.marks = index_hashes(marks)
        self.shingles = Shingles.of_sizes(*join_columns((some.values, some.sizes) for some in sets))

    def without(self, common: ndarray) -> Index:
        """Return the index less some of its runs of words: those that many training texts have are phrases, not leaks.

        Args:
            common: their hashes, uint64, ascending.
        """
        index = copy(self)
        left = ~held(common, self.grams.hashes)
        index.grams = HashTable(self.grams.hashes[left], self.grams.owners[left])
        return index

    def near(self, block: Features) -> tuple[ndarray, ndarray]:
        """Return pairs of texts of a block and evaluation texts that reach the threshold and have the same numbers."""
        sets = block.shingles
        if self.threshold is None:
            return NO_NUMBERS, NO_NUMBERS
        texts, found = self.marks.find_pairs(*self.rarity.marks(sets, self.threshold))
        same = block.numbers[texts] == self.numbers[found]
        texts, found = texts[same], found[same]
        enough = jaccard(sets, texts, self.shingles, found) >= self.threshold
        return texts[enough], found[enough]


def index_hashes(parts: list[Owned], within: ndarray | None = None) -> HashTable:
    """Return a table of hashes and owners, part by part, these ascending. `parts` is empty then: two copies would need
    room.

    Args:
        within: of each owner, the set in which the first owner of a hash alone counts; None keeps all.
    """
    values, owners = join_columns([(NO_HASHES, np.zeros(0, np.int32)), *parts])
    parts.clear()
    order = np.argsort(values, kind="stable")  # of equal ones, owners stay in order
    values, owners = values[order], owners[order]
    del order
    if within is None:
        return HashTable(values, owners)
    first = is_new(values, within[owners])
    return HashTable(values[first], owners[first])


def hits(index: Index, texts: Texts) -> Matches:
    """Return the training texts that are in evaluation sets, by text and then by set. Each comes once a set: with the
    first row by the first rule that holds for any."""
    found = [(NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)]  # text, evaluation text, rule
    at = 0
    for block in iter_features(texts, index.width, index.threshold is not None):
        by_rule = {
            EXACT: index.short.find_pairs(block.short, block.short_owners),
            NGRAM: index.grams.find_pairs(block.grams.values, block.grams.owners),
            NEAR: index.near(block),
        }
        found += [(text + at, owner, np.full(len(text), rule)) for rule, (text, owner) in by_rule.items()]
        at += len(block.grams)
    text, owner, rule = join_columns(found)
    evaluation = index.evaluation[owner]
    order = np.lexsort((owner, rule, evaluation, text))
    text, evaluation, owner, rule = text[order], evaluation[order], owner[order], rule[order]
    first = is_new(text, evaluation)
    return Matches(text[first], evaluation[first], index.row[owner[first]], rule[first])


class Tally:
    """How often hashes come, exactly up to 255. A hash takes 9 bytes, and 17 while others come in."""

    LEAST = 1 << 20
    """Hashes that are counted together, or a quarter as many as there are: those are copied a few times only."""

    def __init__(self) -> None:
        self.hashes = NO_HASHES
        self.counts = np.zeros(0, np.uint8)
        self._new = list[ndarray]()
        self._new_count = 0

    def add(self, hashes: ndarray) -> None:
        self._new.append(hashes)
        self._new_count += len(hashes)
        if self._new_count >= max(self.LEAST, len(self.hashes) // 4):
            self._settle()

    def _settle(self) -> None:
        hashes, counts = np.unique(join(self._new, NO_HASHES), return_counts=True)
        self._new = []
        self._new_count = 0
        at = np.searchsorted(self.hashes, hashes)
        known = held(self.hashes, hashes)
        self.counts[at[known]] = np.minimum(self.counts[at[known]] + counts[known], 255)
        self.hashes = np.insert(self.hashes, at[~known], hashes[~known])
        self.counts = np.insert(self.counts, at[~known], np.minimum(counts[~known], 255))

    def above(self, most: int) -> ndarray:
        """Return the hashes that came more often than that (under 255), ascending."""
        self._settle()
        return self.hashes[self.counts > most]


class Prefilter:
    """What evaluation texts are, in a few bytes a word, and which training texts may be hits of them.

    In this order: evaluation texts are given twice, to `measure` and to `add`; training texts to `tell`; and those of
    them that it names to `maybe`.

    Args:
        threshold: as for `Index`.
    """

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self._rarity = Rarity()
        self._size = 0
        self._runs = Tally()

    def measure(self, texts: Texts) -> None:
        """Count what is to be added, and how common it is."""
        for block in self._blocks(texts):
            self._rarity.add(block.shingles)
            self._size += len(block.grams.values) + len(self._others(block)[0])

    @cached_property
    def _filter(self) -> BloomFilter:
        return BloomFilter(self._size)

    def add(self, texts: Texts) -> None:
        """Add what `tell` and `maybe` look for."""
        for block in self._blocks(texts):
            self._filter.add(spread(block.grams.values))
            self._filter.add(spread(self._others(block)[0]))

    def tell(self, texts: Texts) -> ndarray:
        """Return which of these texts have anything in common with evaluation texts, bool (N): all that do, and few
        others. The runs of words that they have in common are counted."""

        def count(runs: ndarray) -> ndarray:
            self._runs.add(runs)
            return np.ones(len(runs), bool)

        return self._alike(texts, count)

    @cached_property
    def phrases(self) -> ndarray:
        """The runs of words that are phrases, uint64, ascending; once all texts are told."""
        return self._runs.above(COMMON)

    def maybe(self, texts: Texts) -> ndarray:
        """Return which of these texts may be hits if phrases do not count, bool (N): all that are, and few others."""
        return self._alike(texts, lambda runs: ~held(self.phrases, runs))

    def _alike(self, texts: Texts, counts: Callable[[ndarray], ndarray]) -> ndarray:
        """Return which texts have anything in common with evaluation texts.

        Args:
            counts: which runs of words, of some that they have in common, count.
        """
        found = [np.zeros(0, bool)]
        for block in self._blocks(texts):
            alike = np.zeros(len(block.grams), bool)
            there = self._filter.maybe(spread(block.grams.values))
            alike[block.grams.owners[there][counts(block.grams.values[there])]] = True
            others, of = self._others(block)
            alike[of[self._filter.maybe(spread(others))]] = True
            found.append(alike)
        return np.concatenate(found)

    def _blocks(self, texts: Texts) -> Iterator[Features]:
        return iter_features(texts, WIDTH, self.threshold is not None)

    def _others(self, block: Features) -> tuple[ndarray, ndarray]:
        """Return, beside runs of words, the hashes of which hits have one in common, and the place in the block of
        each."""
        if self.threshold is None:
            return block.short, block.short_owners
        marks, owners = self._rarity.marks(block.shingles, self.threshold)
        return np.append(block.short, marks), np.append(block.short_owners, owners)


def spread(hashes: ndarray) -> ndarray:
    """Return hashes of which every bit counts, as a filter asks for: those of runs of words have no more than 54
    bits."""
    return mixed(hashes.copy())
