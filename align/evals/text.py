"""What can be said of texts by counting: diversity, repetition, length.

A policy that games its reward shows here first: it repeats itself, runs long, or says one thing to everybody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Letters and digits of any script, an inner apostrophe kept (don't); punctuation and emoji are parted off and dropped.
WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """Lower-cased word tokens, punctuation dropped: "Don't stop, Anna!" gives `don't stop anna`."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of `n` tokens, in order; none where the text is shorter than `n`."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct n-grams among all n-grams of all texts, in [0, 1]; 0 where there are none at all.

    The n-grams are pooled over texts (a corpus figure: the same answer to every prompt scores low), never across the
    border of two texts. It falls as texts are added or grow longer, so compare sets of equal number only, and read it
    beside their lengths. Source: Li et al. 2016, arXiv 1510.03055.
    """
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Mean over texts of the share of a text's n-grams that it had already used, in [0, 1].

    Texts shorter than `n` words cannot repeat and are passed over; 0 where all are.
    Source: `seq-rep-n` of Welleck et al. 2020, arXiv 1908.04319, on words.
    """
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := list(ngrams(words(text), n)))]
    return float(np.mean(shares)) if shares else 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long texts are, in the caller's unit.

    Attributes:
        p05, p95: 5th and 95th percentile, linear between neighbours.
    """

    mean: float
    median: float
    p05: float
    p95: float
    longest: float


def length_stats(lengths: Sequence[float]) -> Lengths:
    """Mean, median and tails of lengths, usually tokens a response.

    Raises:
        ValueError: there are none.
    """
    if not len(lengths):
        raise ValueError("no lengths to describe")
    values = np.asarray(lengths, dtype=np.float64)
    p05, median, p95 = np.quantile(values, [0.05, 0.5, 0.95])
    return Lengths(float(values.mean()), float(median), float(p05), float(p95), float(values.max()))
