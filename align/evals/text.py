"""What can be said of texts by counting: diversity, favourite words.

A policy that games its reward shows here first: it repeats itself, runs long, or says one thing to everybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from align.core.types import Message
from align.data.ngrams import iter_ngrams, tokenize_words
from align.track import format_turn, truncate_text

QUOTED_LETTERS = 80


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of distinct n-grams among all n-grams of all texts, in [0, 1]; 0 where there are none at all.

    The n-grams are pooled over texts (a corpus figure: the same answer to every prompt scores low), never across the
    border of two texts. It falls as texts are added or grow longer, so compare sets of equal number only, and read it
    beside their lengths. Source: Li et al. 2016, arXiv 1510.03055.
    """
    grams = [gram for text in texts for gram in iter_ngrams(tokenize_words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class Risen:
    """A word that one set of texts uses more than another.

    Attributes:
        word: lower-cased.
        ref, policy: share of the texts that hold it, in [0, 1].
    """

    word: str
    ref: float
    policy: float


def most_risen(ref: Sequence[str], policy: Sequence[str]) -> Risen:
    """The word whose share of texts rose most from `ref` to `policy`: what a policy that games its reward says to
    everybody. The first by the alphabet where several rose alike; no word at all where none rose."""
    shares = [Counter(word for text in texts for word in set(tokenize_words(text))) for texts in (ref, policy)]
    before, after = (
        {w: count / len(texts) for w, count in found.items()}
        for texts, found in zip((ref, policy), shares, strict=True)
    )
    risen = [(before.get(w, 0.0) - share, w) for w, share in after.items() if share > before.get(w, 0.0)]
    word = min(risen)[1] if risen else ""
    return Risen(word, before.get(word, 0.0), after.get(word, 0.0))


def quote(text: str) -> str:
    """Return the beginning of a text on one line, in quotation marks."""
    return f"“{truncate_text(text, QUOTED_LETTERS)}”"


def join_turns(turns: Sequence[Message]) -> str:
    return "\n".join(format_turn(message.as_dict()) for message in turns)
