"""Which of very many texts are worth asking an `Index` of evaluation texts for, where one index cannot hold them all.

They are indexed a slice at a time, and a text that has nothing in common with any of them need not be asked about at
each slice. So training texts are read twice, however many slices there are: once to learn which runs of words are so
common that they are phrases, and once to find the texts that have anything else in common with evaluation texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa

from align.data.dedup.arrays import held
from align.data.dedup.bloom import BloomFilter
from align.data.dedup.contamination import Features, iter_features, owners_of
from align.data.dedup.prefixes import Rarity
from align.data.dedup.words import mixed


class Tally:
    """How often hashes come, exactly up to 255. A hash takes 9 bytes, and 17 while others come in."""

    LEAST = 1 << 20
    """Hashes that are counted together, or a quarter as many as there are: those are copied a few times only."""

    def __init__(self) -> None:
        self.hashes, self.counts = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        self._new, self._many = list[np.ndarray](), 0

    def add(self, hashes: np.ndarray) -> None:
        self._new.append(hashes)
        self._many += len(hashes)
        if self._many >= max(self.LEAST, len(self.hashes) // 4):
            self._settle()

    def _settle(self) -> None:
        hashes, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *self._new]), return_counts=True)
        self._new, self._many = [], 0
        at = np.searchsorted(self.hashes, hashes)
        known = held(self.hashes, hashes)
        self.counts[at[known]] = np.minimum(self.counts[at[known]] + counts[known], 255)
        self.hashes = np.insert(self.hashes, at[~known], hashes[~known])
        self.counts = np.insert(self.counts, at[~known], np.minimum(counts[~known], 255))

    def above(self, most: int) -> np.ndarray:
        """The hashes that came more often than that (under 255), ascending."""
        self._settle()
        return self.hashes[self.counts > most]


class Prefilter:
    """What evaluation texts are, in a few bytes a word, and which training texts may be hits of them.

    In this order: evaluation texts are given twice, to `measure` and to `add`; training texts to `tell`; and those of
    them that it names to `maybe`.

    Args:
        most: training texts that may have a run of words before it is a phrase, and no leak.
        width, threshold: as for `align.data.dedup.contamination.Index`.
    """

    def __init__(self, most: int, width: int = 13, threshold: float | None = 0.7) -> None:
        self.most, self.width, self.threshold = most, width, threshold
        self._rarity, self._size, self._runs = Rarity(), 0, Tally()

    def measure(self, texts: pa.Array | pa.ChunkedArray) -> None:
        """Count what is to be added, and how common it is."""
        for block in self._blocks(texts):
            self._rarity.add(block.shingles)
            self._size += len(block.grams.values) + len(self._others(block)[0])

    @cached_property
    def _filter(self) -> BloomFilter:
        return BloomFilter(self._size)

    def add(self, texts: pa.Array | pa.ChunkedArray) -> None:
        """What `tell` and `maybe` look for."""
        for block in self._blocks(texts):
            self._filter.add(spread(block.grams.values))
            self._filter.add(spread(self._others(block)[0]))

    def tell(self, texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Which of these texts have anything in common with evaluation texts, bool (N): all that do, and few others.
        The runs of words that they have in common are counted."""

        def counted(runs: np.ndarray) -> np.ndarray:
            self._runs.add(runs)
            return np.ones(len(runs), bool)

        return self._alike(texts, counted)

    @cached_property
    def phrases(self) -> np.ndarray:
        """The runs of words that are phrases, uint64, ascending; once all texts are told."""
        return self._runs.above(self.most)

    def maybe(self, texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Which of these texts may be hits where phrases do not count, bool (N): all that are, and few others."""
        return self._alike(texts, lambda runs: ~held(self.phrases, runs))

    def _alike(self, texts: pa.Array | pa.ChunkedArray, counts: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Which texts have anything in common with evaluation texts.

        Args:
            counts: which runs of words, of some that they have in common, count.
        """
        found = [np.zeros(0, bool)]
        for block in self._blocks(texts):
            alike = np.zeros(len(block.grams), bool)
            there = self._filter.maybe(spread(block.grams.values))
            alike[owners_of(block.grams)[there][counts(block.grams.values[there])]] = True
            others, of = self._others(block)
            alike[of[self._filter.maybe(spread(others))]] = True
            found.append(alike)
        return np.concatenate(found)

    def _blocks(self, texts: pa.Array | pa.ChunkedArray) -> Iterator[Features]:
        return iter_features(texts, self.width, self.threshold is not None)

    def _others(self, block: Features) -> tuple[np.ndarray, np.ndarray]:
        """Beside runs of words, the hashes of which hits have one in common, and the place in the block of each."""
        if self.threshold is None:
            return block.short, block.short_owners
        marks, many = self._rarity.marks(block.shingles, self.threshold)
        owners = np.repeat(np.arange(len(many)), many)
        return np.concatenate([block.short, marks]), np.concatenate([block.short_owners, owners])


def spread(hashes: np.ndarray) -> np.ndarray:
    """Hashes of which every bit counts, as a filter asks for: those of runs of words have no more than 54 bits."""
    return mixed(hashes.copy())
