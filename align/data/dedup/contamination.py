"""Contamination: which training texts hold what a model is to be evaluated on.

A training text is a hit of an evaluation text by one of three rules, the first that holds being the one that is named:

- `EXACT`: both have the same words, numbers and operators in the same order, and fewer words than `width`.
- `NGRAM`: they have a run of `width` words in common (13, as in Brown et al. 2020, arXiv 2005.14165, appendix C).
- `NEAR`: the Jaccard similarity of their word 3-shingles reaches the threshold, and they have the same numbers and
  operators.

Each rule finds every such pair. The last one needs no MinHash, because prefix filtering (`align.data.dedup.prefixes`)
leaves few pairs. A text without words is never a hit. `align.data.dedup.words` says what a word is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from align.data.dedup.arrays import held, ranges
from align.data.dedup.hash_table import HashTable
from align.data.dedup.jaccard import jaccard
from align.data.dedup.numbers import number_hashes
from align.data.dedup.prefixes import Rarity
from align.data.dedup.shingles import Shingles, runs
from align.data.dedup.words import ODD, blocks, mixed, word_hashes

EXACT, NGRAM, NEAR = range(3)
RULES = ("exact", "ngram", "near")
"""Their names, by number."""


Pairs = tuple[np.ndarray, np.ndarray]
"""Hashes (uint64) and the numbers of the texts that have them (int32)."""


@dataclass(frozen=True)
class Hits:
    """One row a training text and evaluation set, by text and then by set."""

    text: np.ndarray
    """int64: which of the training texts."""
    evaluation: np.ndarray
    """int64: which evaluation set, in the order of `Index.names`."""
    row: np.ndarray
    """int64: the first text of that set that it is a hit of, by the first rule that holds for any."""
    rule: np.ndarray
    """int64: `EXACT`, `NGRAM` or `NEAR`."""


def index_hashes(parts: list[tuple[np.ndarray, np.ndarray]], within: np.ndarray | None = None) -> HashTable:
    """Return a table of hashes and owners, part by part, these ascending. `parts` is empty then: two copies would need
    room.

    Args:
        within: of each owner, the set in which the first owner of a hash alone counts; None keeps all.
    """
    values = np.concatenate([np.zeros(0, np.uint64), *(values for values, _ in parts)])
    owners = np.concatenate([np.zeros(0, np.int32), *(owners for _, owners in parts)])
    parts.clear()
    order = np.argsort(values, kind="stable")  # of equal ones, owners stay in order
    values = values[order]
    owners = owners[order]
    del order
    if within is None:
        return HashTable(values, owners)
    first = np.ones(len(values), bool)
    first[1:] = (values[1:] != values[:-1]) | (within[owners[1:]] != within[owners[:-1]])
    return HashTable(values[first], owners[first])


@dataclass(frozen=True)
class Features:
    """What a block of texts is compared by. Owners are the places of texts in the block."""

    short: np.ndarray
    """uint64: hashes of the whole texts that have fewer words than a run."""
    short_owners: np.ndarray
    grams: Shingles
    """Runs of `width` words."""
    shingles: Shingles
    """None of any text where near-duplicates are not looked for."""
    numbers: np.ndarray
    """uint64: hashes of the numbers and operators of each text (`number_hashes`)."""

    @classmethod
    def of(cls, data: np.ndarray, starts: np.ndarray, numbers: np.ndarray, width: int, near: bool) -> Features:
        hashes, counts = word_hashes(data, starts)
        owners = np.flatnonzero((counts > 0) & (counts < width))
        first, whole = (np.cumsum(counts) - counts)[owners], counts[owners].astype(np.uint64)
        for word in range(width - 1):
            longer = counts[owners] > word
            whole[longer] = mixed(whole[longer] * ODD + hashes[first[longer] + word])
        whole ^= numbers[owners]
        none = Shingles(np.zeros(0, np.uint64), np.zeros(len(counts) + 1, np.int64))
        return cls(whole, owners, sets(hashes, counts, width), sets(hashes, counts, 3) if near else none, numbers)


def iter_features(texts: pa.Array | pa.ChunkedArray, width: int, near: bool) -> Iterator[Features]:
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


def sets(hashes: np.ndarray, counts: np.ndarray, width: int) -> Shingles:
    values, sizes = runs(hashes, counts, width)
    return Shingles(values, np.append(0, np.cumsum(sizes)))


def owners_of(sets: Shingles) -> np.ndarray:
    return np.repeat(np.arange(len(sets)), sets.sizes)


class Index:
    """Evaluation sets, to be asked for the texts that are in them.

    A byte of their text takes some 5 bytes, and 7 while the index is made.

    Args:
        evaluations: by name, the texts of each set. A row with several texts may give each.
        width: words of a run, at least 3.
        threshold: of the Jaccard similarity, in (0, 1]; None where near-duplicates are not looked for.
    """

    def __init__(
        self, evaluations: Mapping[str, pa.Array | pa.ChunkedArray], width: int = 13, threshold: float | None = 0.7
    ) -> None:
        self.names = tuple(evaluations)
        self.width, self.threshold = width, threshold
        counts = np.array([len(texts) for texts in evaluations.values()], np.int64)
        self.evaluation = np.repeat(np.arange(len(counts)), counts)
        self.row = ranges(np.zeros(len(counts), np.int64), counts)
        self.rarity, at = Rarity(), 0
        numbers = [np.zeros(0, np.uint64)]
        short, grams, values, sizes = list[Pairs](), list[Pairs](), [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for texts in evaluations.values():
            for part in iter_features(texts, width, threshold is not None):
                short.append((part.short, (part.short_owners + at).astype(np.int32)))
                grams.append((part.grams.values, (owners_of(part.grams) + at).astype(np.int32)))
                values.append(part.shingles.values)
                sizes.append(part.shingles.sizes)
                numbers.append(part.numbers)
                self.rarity.add(part.shingles)
                at += len(part.grams)
        self.short, self.grams = (index_hashes(parts, self.evaluation) for parts in (short, grams))
        self.shingles = Shingles(np.concatenate(values), np.append(0, np.cumsum(np.concatenate(sizes))))
        self.numbers = np.concatenate(numbers)
        del values
        self.marks = index_hashes(self._marks(list(map(len, sizes)), threshold) if threshold is not None else [])

    def _marks(self, counts: list[int], threshold: float) -> list[Pairs]:
        """Args: counts: texts that are looked at together."""
        found, at = list[Pairs](), 0
        for count in counts:
            offsets = self.shingles.offsets[at : at + count + 1]
            some = Shingles(self.shingles.values[offsets[0] : offsets[-1]], offsets - offsets[0])
            mark, many = self.rarity.marks(some, threshold)
            found.append((mark, np.repeat(np.arange(at, at + count, dtype=np.int32), many)))
            at += count
        return found

    def without(self, common: np.ndarray) -> Index:
        """The index less some of its runs of words: those that many training texts have are phrases, not leaks.

        Args:
            common: their hashes, uint64, ascending.
        """
        made, left = copy(self), ~held(common, self.grams.hashes)
        made.grams = HashTable(self.grams.hashes[left], self.grams.owners[left])
        return made

    def near(self, block: Features) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs of texts of a block and evaluation texts that reach the threshold and have the same numbers."""
        sets = block.shingles
        if self.threshold is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        marks, many = self.rarity.marks(sets, self.threshold)
        texts, found = self.marks.find_pairs(marks, np.repeat(np.arange(len(sets)), many))
        same = block.numbers[texts] == self.numbers[found]
        texts = texts[same]
        found = found[same]
        enough = jaccard(sets, texts, self.shingles, found) >= self.threshold
        return texts[enough], found[enough]


def hits(index: Index, texts: pa.Array | pa.ChunkedArray) -> Hits:
    """The training texts, of N strings where null is the empty text, that are in evaluation sets."""
    none = np.zeros(0, np.int64)
    found, at = [(none, none, none)], 0  # text, evaluation text, rule
    for block in iter_features(texts, index.width, index.threshold is not None):
        for rule, (text, owner) in enumerate((
            index.short.find_pairs(block.short, block.short_owners),
            index.grams.find_pairs(block.grams.values, owners_of(block.grams)),
            index.near(block),
        )):  # fmt: skip
            found.append((text + at, owner, np.full(len(text), rule)))
        at += len(block.grams)
    text, owner, rule = (np.concatenate(parts) for parts in zip(*found, strict=True))
    evaluation = index.evaluation[owner]
    order = np.lexsort((owner, rule, evaluation, text))
    text, evaluation, owner, rule = text[order], evaluation[order], owner[order], rule[order]
    first = np.ones(len(text), bool)
    first[1:] = (np.diff(text) != 0) | (np.diff(evaluation) != 0)
    return Hits(text[first], evaluation[first], index.row[owner[first]], rule[first])
