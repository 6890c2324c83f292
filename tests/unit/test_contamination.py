"""Tests that contaminated texts are found, near misses are not, and the index agrees with sets of n-grams."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.dedup import shingles
from align.data.dedup.evaluation_overlap import EXACT, NEAR, NGRAM, OverlapIndex, find_overlapping_texts

WORDS = [f"w{chr(97 + i // 20)}{chr(97 + i % 20)}" for i in range(400)]
"""Words without digits: texts whose digits differ are never near-duplicates."""


def draw_words(rng: np.random.Generator, count: int) -> list[str]:
    return [str(word) for word in rng.choice(WORDS, count)]


def build_ngrams(text: str, width: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


def list_matches(index: OverlapIndex, texts: list[str | None]) -> list[tuple[int, ...]]:
    """Return the text, the set, the row of the set and the rule of each match."""
    matches = find_overlapping_texts(index, pa.array(texts, pa.string()))
    return list(zip(*(column.tolist() for column in matches), strict=True))


def build_index(width: int = 13, threshold: float = 0.7, **sets: list[str | None]) -> OverlapIndex:
    return OverlapIndex([pa.array(texts, pa.string()) for texts in sets.values()], width, threshold)


def iter_matches(sets: dict[str, list[str]], texts: list[str], width: int, threshold: float):
    for number, text in enumerate(texts):
        for place, rows in enumerate(sets.values()):
            for rule in (EXACT, NGRAM, NEAR):
                row = next((i for i, row in enumerate(rows) if rule_matches(rule, text, row, width, threshold)), None)
                if row is not None:
                    yield number, place, row, rule
                    break


def rule_matches(rule: int, text_a: str, text_b: str, width: int, threshold: float) -> bool:
    if rule == EXACT:
        return text_a.split() == text_b.split() and 0 < len(text_a.split()) < width
    if rule == NGRAM:
        return bool(build_ngrams(text_a, width) & build_ngrams(text_b, width))
    ngrams_a = build_ngrams(text_a, 3)
    ngrams_b = build_ngrams(text_b, 3)
    return bool(ngrams_a) and bool(ngrams_b) and len(ngrams_a & ngrams_b) / len(ngrams_a | ngrams_b) >= threshold


SOME = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(["x", "y", "z"]), st.lists(SOME, max_size=6), max_size=3),
    st.lists(SOME, max_size=8),
    st.sampled_from([3, 4, 5, 13]),
    st.sampled_from([0.3, 0.5, 0.7, 1.0]),
)
def test_as_one_by_one(sets, texts, width, threshold):
    assert list_matches(build_index(width, threshold, **sets), texts) == list(
        iter_matches(sets, texts, width, threshold)
    )


def test_each_rule_by_hand():
    rng = np.random.default_rng(0)
    long_words = draw_words(rng, 40)
    other_words = draw_words(rng, 40)
    index = build_index(
        short=["", "What is 2 + 2?", "Yes.", "!!!"],
        exam=[" ".join(other_words), " ".join(long_words)],
        empty=[],
        null=[None],
    )
    inside = [*draw_words(rng, 20), *long_words[9:22], *draw_words(rng, 20)]
    one_less = [*draw_words(rng, 20), *long_words[9:21], *draw_words(rng, 20)]
    changed = [word if i % 11 else "other" for i, word in enumerate(long_words)]  # every run of 13 words is broken
    assert list_matches(index, ["what is 2+2", "what is 2 - 2", "is 2 + 2", "YES", "yes yes", "", "???", None]) == [
        (0, 0, 1, EXACT),
        (3, 0, 2, EXACT),
    ]
    assert list_matches(index, [" ".join(inside), " ".join(one_less), " ".join(long_words).upper()]) == [
        (0, 1, 1, NGRAM),
        (2, 1, 1, NGRAM),
    ]
    assert list_matches(index, [" ".join(changed)]) == []  # 26 of 50 shingles
    assert list_matches(build_index(exam=[" ".join(long_words)], threshold=0.5), [" ".join(changed)]) == [
        (0, 0, 0, NEAR)
    ]


def test_every_set_is_named_once_by_its_first_row():
    index = build_index(a=["x", "yes", "yes"], b=["no", "no", "Yes!"])
    assert list_matches(index, ["no", "yes"]) == [(0, 1, 0, EXACT), (1, 0, 1, EXACT), (1, 1, 2, EXACT)]


def test_planted_texts_are_all_found_and_near_misses_are_not(monkeypatch):
    monkeypatch.setattr(shingles, "BLOCK_BYTES", 5000)  # many blocks
    rng = np.random.default_rng(1)
    exams = {name: [" ".join(draw_words(rng, length)) for length in rng.integers(1, 60, 60)] for name in ("a", "b")}
    texts = []
    planted = {}
    for number in range(800):
        text = draw_words(rng, int(rng.integers(20, 60)))
        name = str(rng.choice(["a", "b"]))
        row = int(rng.integers(60))
        exam = exams[name][row].split()
        if number % 4 == 0:
            at = int(rng.integers(max(len(exam) - 12, 1)))
            text = [*text[:5], *exam[at : at + 13], *text[5:]] if len(exam) >= 13 else exam
            planted[number] = ["a", "b"].index(name)
        elif number % 4 == 1:
            text[5:5] = exam[:12]
        texts.append(" ".join(text))
    matches = list_matches(build_index(**exams), texts)
    assert set(planted.items()) <= {(number, place) for number, place, _, _ in matches}
    assert matches == list(iter_matches(exams, texts, 13, 0.7))
    assert len(matches) < 250


def test_batches_change_nothing():
    rng = np.random.default_rng(2)
    exam = [" ".join(draw_words(rng, 20)) for _ in range(3000)]  # more than a block
    texts = [" ".join(draw_words(rng, 30)) for _ in range(2500)] + exam[::7] + ["é " + row for row in exam[::11]]
    index = build_index(exam=exam)
    matches = find_overlapping_texts(index, pa.array(texts))
    assert len(matches.text) == len(texts) - 2500
    assert np.array_equal(matches.row, [*range(0, 3000, 7), *range(0, 3000, 11)])
    chunked_matches = find_overlapping_texts(
        index, pa.chunked_array([pa.array(texts[:77]), pa.array([], pa.string()), pa.array(texts[77:])])
    )
    for name in ("text", "evaluation", "row", "rule"):
        assert np.array_equal(getattr(matches, name), getattr(chunked_matches, name))
