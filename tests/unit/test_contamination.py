"""Contamination: what is planted is found, what is nearly alike is not, and all of it as sets of strings say."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.dedup import shingles
from align.data.dedup.evaluation_overlap import EXACT, NEAR, NGRAM, OverlapIndex, find_hits

WORDS = [f"w{chr(97 + i // 20)}{chr(97 + i % 20)}" for i in range(400)]
"""Without digits: texts in which these differ are no near-duplicates."""


def text_of(rng: np.random.Generator, many: int) -> list[str]:
    return [str(word) for word in rng.choice(WORDS, many)]


def runs_of(text: str, width: int) -> set[tuple[str, ...]]:
    found = text.split()
    return {tuple(found[i : i + width]) for i in range(len(found) - width + 1)}


def found(index: OverlapIndex, texts: list[str | None]) -> list[tuple[int, ...]]:
    """The text, the number of the set, the row there and the rule of each match."""
    matches = find_hits(index, pa.array(texts, pa.string()))
    return list(zip(*(column.tolist() for column in matches), strict=True))


def index_of(width: int = 13, threshold: float = 0.7, **sets: list[str | None]) -> OverlapIndex:
    return OverlapIndex([pa.array(texts, pa.string()) for texts in sets.values()], width, threshold)


def one_by_one(sets: dict[str, list[str]], texts: list[str], width: int, threshold: float):
    for number, text in enumerate(texts):
        for place, rows in enumerate(sets.values()):
            for rule in (EXACT, NGRAM, NEAR):
                row = next((i for i, row in enumerate(rows) if holds(rule, text, row, width, threshold)), None)
                if row is not None:
                    yield number, place, row, rule
                    break


def holds(rule: int, a: str, b: str, width: int, threshold: float) -> bool:
    if rule == EXACT:
        return a.split() == b.split() and 0 < len(a.split()) < width
    if rule == NGRAM:
        return bool(runs_of(a, width) & runs_of(b, width))
    one, other = runs_of(a, 3), runs_of(b, 3)
    return bool(one) and bool(other) and len(one & other) / len(one | other) >= threshold


SOME = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["x", "y", "z"]), st.lists(SOME, max_size=6), max_size=3),
    st.lists(SOME, max_size=8),
    st.sampled_from([3, 4, 5, 13]),
    st.sampled_from([0.3, 0.5, 0.7, 1.0]),
)
def test_as_one_by_one(sets, texts, width, threshold):
    assert found(index_of(width, threshold, **sets), texts) == list(one_by_one(sets, texts, width, threshold))


def test_each_rule_by_hand():
    rng = np.random.default_rng(0)
    long, other = text_of(rng, 40), text_of(rng, 40)
    index = index_of(
        short=["", "What is 2 + 2?", "Yes.", "!!!"], exam=[" ".join(other), " ".join(long)], empty=[], null=[None]
    )
    inside = [*text_of(rng, 20), *long[9:22], *text_of(rng, 20)]
    one_less = [*text_of(rng, 20), *long[9:21], *text_of(rng, 20)]
    changed = [word if i % 11 else "other" for i, word in enumerate(long)]  # every run of 13 words is broken
    assert found(index, ["what is 2+2", "what is 2 - 2", "is 2 + 2", "YES", "yes yes", "", "???", None]) == [
        (0, 0, 1, EXACT),
        (3, 0, 2, EXACT),
    ]
    assert found(index, [" ".join(inside), " ".join(one_less), " ".join(long).upper()]) == [
        (0, 1, 1, NGRAM),
        (2, 1, 1, NGRAM),
    ]
    assert found(index, [" ".join(changed)]) == []  # 26 of 50 shingles
    assert found(index_of(exam=[" ".join(long)], threshold=0.5), [" ".join(changed)]) == [(0, 0, 0, NEAR)]


def test_every_set_is_named_once_by_its_first_row():
    index = index_of(a=["x", "yes", "yes"], b=["no", "no", "Yes!"])
    assert found(index, ["no", "yes"]) == [(0, 1, 0, EXACT), (1, 0, 1, EXACT), (1, 1, 2, EXACT)]


def test_planted_texts_are_all_found_and_near_misses_are_not(monkeypatch):
    monkeypatch.setattr(shingles, "BLOCK_BYTES", 5000)  # many blocks
    rng = np.random.default_rng(1)
    exams = {name: [" ".join(text_of(rng, many)) for many in rng.integers(1, 60, 60)] for name in ("a", "b")}
    texts, planted = [], {}
    for number in range(800):
        text, name, row = text_of(rng, int(rng.integers(20, 60))), str(rng.choice(["a", "b"])), int(rng.integers(60))
        exam = exams[name][row].split()
        if number % 4 == 0:
            at = int(rng.integers(max(len(exam) - 12, 1)))
            text = [*text[:5], *exam[at : at + 13], *text[5:]] if len(exam) >= 13 else exam
            planted[number] = ["a", "b"].index(name)
        elif number % 4 == 1:
            text[5:5] = exam[:12]
        texts.append(" ".join(text))
    made = found(index_of(**exams), texts)
    assert set(planted.items()) <= {(number, place) for number, place, _, _ in made}
    assert made == list(one_by_one(exams, texts, 13, 0.7))
    assert len(made) < 250


def test_batches_change_nothing():
    rng = np.random.default_rng(2)
    exam = [" ".join(text_of(rng, 20)) for _ in range(3000)]  # more than a block
    texts = [" ".join(text_of(rng, 30)) for _ in range(2500)] + exam[::7] + ["é " + row for row in exam[::11]]
    index = index_of(exam=exam)
    whole = find_hits(index, pa.array(texts))
    assert len(whole.text) == len(texts) - 2500
    assert np.array_equal(whole.row, [*range(0, 3000, 7), *range(0, 3000, 11)])
    parts = find_hits(index, pa.chunked_array([pa.array(texts[:77]), pa.array([], pa.string()), pa.array(texts[77:])]))
    for name in ("text", "evaluation", "row", "rule"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
