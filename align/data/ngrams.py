"""Word n-grams of a text, and its repetition rate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

# Letters and digits of any script, with inner apostrophes (don't). Punctuation and emoji are separators.
WORD = re.compile(r"\w+(?:['’]\w+)*")


def tokenize_words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation: "Don't stop, Anna!" gives `don't stop anna`."""
    return WORD.findall(text.lower())


def iter_ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield all sequences of `n` consecutive tokens, in order. Yields nothing if the text is shorter than `n`."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def compute_repetition(texts: Sequence[str]) -> float:
    """Return the share of a text's word 3-grams that repeat an earlier one, as a mean over the texts, in [0, 1].

    Texts of fewer than three words are skipped. Returns 0 if all are skipped.

    Source: `seq-rep-n` of Welleck et al. 2020, arXiv 1908.04319, on words.
    """
    shares = [
        1 - len(set(grams)) / len(grams) for text in texts if (grams := list(iter_ngrams(tokenize_words(text), 3)))
    ]
    return float(np.mean(shares)) if shares else 0.0
