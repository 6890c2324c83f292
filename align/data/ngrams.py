"""Words of a text, and how often it repeats itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

# Letters and digits of any script, an inner apostrophe kept (don't); punctuation and emoji are parted off and dropped.
WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """Lower-cased word tokens, punctuation dropped: "Don't stop, Anna!" gives `don't stop anna`."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Yield all runs of `n` tokens, in order; none where the text is shorter than `n`."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def repetition(texts: Sequence[str]) -> float:
    """Return the mean over texts of the share of a text's 3-grams that it had already used, in [0, 1].

    Texts shorter than three words cannot repeat and are passed over; 0 where all are.
    Source: `seq-rep-n` of Welleck et al. 2020, arXiv 1908.04319, on words.
    """
    shares = [1 - len(set(grams)) / len(grams) for text in texts if (grams := list(ngrams(words(text), 3)))]
    return float(np.mean(shares)) if shares else 0.0
