"""Prompts near to training rows are those that a second, slow implementation finds word by word."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest

from align.core.types import Conversation, Message, Preference
from align.data import training_overlap
from align.data.dedup.evaluation_overlap import MAX_RUN_ROWS
from align.data.training_overlap import SPEAKER_ROLES, find_near_questions, join_turns_of_roles

WORDS = [f"w{chr(97 + i // 10)}{chr(97 + i % 10)}" for i in range(60)]
"""Words without digits: texts that differ in digits are never near to each other."""


def build_alternating_chat(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(texts)))


def collect_ngrams(text: str, width: int) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


def find_rule_slowly(texts: list[str], question: str) -> str | None:
    """Return the first rule by which a text is near to the question, comparing each pair."""

    def similarity(text: str) -> float:
        a = collect_ngrams(text, 3)
        b = collect_ngrams(question, 3)
        return len(a & b) / len(a | b) if a and b else 0.0

    if len(question.split()) < 13 and any(text.lower().split() == question.lower().split() for text in texts):
        return "exact"
    if any(collect_ngrams(text, 13) & collect_ngrams(question, 13) for text in texts):
        return "ngram"
    return "near" if any(similarity(text) >= 0.7 for text in texts) else None


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_what_a_slow_search_finds(seed: int, monkeypatch: pytest.MonkeyPatch):
    draw = random.Random(seed)
    rows = [
        build_alternating_chat(*(" ".join(draw.choices(WORDS, k=draw.randint(2, 30))) for _ in range(2)))
        for _ in range(40)
    ]
    questions = []
    for _ in range(60):
        words = draw.choice(rows).messages[draw.randint(0, 1)].content.split()
        for _ in range(draw.randint(0, 3)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        questions.append(" ".join([*words, *draw.choices(WORDS, k=draw.randint(0, 2))]))
    texts = [text for row in rows for text in (join_turns_of_roles(row, SPEAKER_ROLES), row.messages[0].content)]
    slow = {i: rule for i, question in enumerate(questions) if (rule := find_rule_slowly(texts, question))}
    assert {*slow.values()} == {"exact", "ngram", "near"} or seed > 3
    assert find_near_questions(rows, pa.array(questions), 0.7) == slow
    monkeypatch.setattr(training_overlap, "SLICE_BYTES", 200)
    assert find_near_questions(rows, pa.array(questions), 0.7) == slow


def test_what_many_rows_share_is_a_phrase():
    phrase = " ".join(f"p{i}" for i in range(20))
    rows = [
        build_alternating_chat(f"{phrase} {' '.join(f'q{n}x{i}' for i in range(60))}", "yes")
        for n in range(MAX_RUN_ROWS + 1)
    ]
    question = pa.array([f"{phrase} {' '.join(f'other{i}' for i in range(60))}"])
    assert find_near_questions(rows[:MAX_RUN_ROWS], question, 0.7) == {0: "ngram"}
    assert find_near_questions(rows, question, 0.7) == {}
    shared = " ".join(f"other{i}" for i in range(30, 42))  # enough to compare the row, and not a leak
    assert find_near_questions([*rows, build_alternating_chat(f"{phrase} z {shared}", "yes")], question, 0.7) == {}


def test_system_turns_tell_nothing_and_pairs_are_read_whole():
    long = " ".join(f"s{i}" for i in range(20))
    system = Conversation((Message("system", long), Message("user", "What now?"), Message("assistant", "This.")))
    pair = Preference((Message("user", "Which?"),), (Message("assistant", long),), (Message("assistant", "no"),))
    assert find_near_questions([system], pa.array([long]), 0.7) == {}
    assert find_near_questions([pair], pa.array([long, "which?"]), 0.7) == {0: "ngram", 1: "exact"}
    assert find_near_questions([long], pa.array([long]), 0.7) == {0: "ngram"}
    assert find_near_questions([], pa.array([long]), 0.7) == {}
