"""Statistics of texts from word counts: diversity, and words that became more frequent.

A policy that games its reward often shows here first: it repeats itself, grows long, or uses one phrase in every
answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from align.core.types import Message
from align.data.ngrams import iter_ngrams, tokenize_words
from align.track import format_turn, truncate_text

QUOTED_LETTERS = 80


def compute_distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams of all texts, in [0, 1]. Returns 0 if there are no
    n-grams.

    The n-grams are pooled over texts, so that the same answer to every prompt scores low, and never cross from one text
    to the next. The share falls as texts are added or grow longer: compare sets of equal size only, and read it
    together with their lengths. Source: Li et al. 2016, arXiv 1510.03055.
    """
    grams = [gram for text in texts for gram in iter_ngrams(tokenize_words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class RisenWord:
    """A word that is in a larger share of one set of texts than of another.

    Attributes:
        word: in lower case.
        ref, policy: share of the texts that contain it, in [0, 1].
    """

    word: str
    ref: float
    policy: float


def find_most_risen_word(ref: Sequence[str], policy: Sequence[str]) -> RisenWord:
    """Return the word whose share of texts increased most from `ref` to `policy`, with both shares.

    Of several words that rose equally, the alphabetically first is returned. The word is empty if no share rose.
    """
    ref_shares = _compute_word_shares(ref)
    policy_shares = _compute_word_shares(policy)
    changes = [
        (ref_shares.get(word, 0.0) - share, word)
        for word, share in policy_shares.items()
        if share > ref_shares.get(word, 0.0)
    ]
    word = min(changes)[1] if changes else ""
    return RisenWord(word, ref_shares.get(word, 0.0), policy_shares.get(word, 0.0))


def _compute_word_shares(texts: Sequence[str]) -> dict[str, float]:
    counts = Counter(word for text in texts for word in set(tokenize_words(text)))
    return {word: count / len(texts) for word, count in counts.items()}


def quote_beginning(text: str) -> str:
    """Return the first 80 characters of a text on one line, in quotation marks."""
    return f"“{truncate_text(text, QUOTED_LETTERS)}”"


def join_turns(turns: Sequence[Message]) -> str:
    return "\n".join(format_turn(message.as_dict()) for message in turns)
