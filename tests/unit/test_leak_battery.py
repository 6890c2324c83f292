"""Questions of evaluation sets are found in any disguise, and unrelated rows are not taken for them."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from align.core.types import Conversation, Message
from align.data.dedup.questions import (
    MAX_WIDTH,
    MIN_WIDTH,
    choose_run_width,
    hash_evaluation_questions,
    hash_training_prompts,
    iter_word_blocks,
    weigh_words,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "data"))
from leaks import (
    DISGUISES,
    QUESTIONS,
    create_evaluations,
    find_leaks,
    load_long_questions,
    load_unrelated_rows,
    measure_leaks,
)


def find_rules(questions: list[str], texts: list[str]) -> list[str]:
    """Return for each text the rule by which it contains one of the questions, or an empty string."""
    rows = find_leaks(create_evaluations([{"question": question} for question in questions]), texts)
    return [rows.get(i, "") for i in range(len(texts))]


def test_every_disguise_of_every_group_is_found():
    outcomes = measure_leaks({**QUESTIONS, "long": load_long_questions(40)}, seed=1)
    assert {name for name, _ in outcomes} == {*DISGUISES, "with options", "options reordered"}
    for (name, group), outcome in outcomes.items():
        least = 0.8 if name == "one word changed" else 0.99
        assert outcome.found >= least * outcome.planted, (name, group, outcome.missed)


def test_unrelated_rows_are_not_taken_for_leaks():
    rows = load_unrelated_rows(1500)
    questions = [*QUESTIONS["short"], *load_long_questions(100)]
    assert len(find_leaks(create_evaluations([{"question": question} for question in questions]), rows)) <= 1


@pytest.mark.parametrize(
    ("question", "text", "rule"),
    [
        ("What is 2+2?", "WHAT IS 2 + 2", "question"),
        ("What is 2+2?", "Question: What is 2+2?\nAnswer:", "question"),
        ("What is 2+2?", "What is 2*2?\nFour.", ""),
        ("What is 2+2?", "What is 22\nA number.", "contained"),  # all punctuation removed
        ("What is 2+2?", "What is 2 2\nA number.", "contained"),
        ("What is 2+2?", "What is 2+2+3?", ""),
        ("What is 2+2?", "I know what is 2+2 and what is not.", ""),
        ("Who are you?", "12. Who are you?", "question"),
        ("Who are you?", "Well, hello there! Who are you? I am Anna.", ""),
        ("Who are you?", "They asked Q: Who are you? A: Anna.", "contained"),
        ("Who wrote Hamlet?", "Tell me: who wrote Hamlet? Quick!", "contained"),
        ("Who wrote Hamlet?", "The man who wrote Hamlet lived in London.", ""),
        ("Don't you know which tool measures mass?", "dont you know which tool measures mass", "question"),
        ("How many minutes are there in 1,500 hours?", "how many minutes are there in 1500 hours, eh?", "contained"),
        ("How many minutes are there in 1.5 hours?", "How many minutes are there in 15 hours?", ""),
        ("How many minutes are there in 15 hours?", "How many minutes are there in ١٥ hours?", "question"),
        ("How many minutes are there in 15 hours?", "How many minutes are there in 16 hours?", ""),
        ("How many minutes are there in 15 hours?", "How many seconds are there in 15 hours?", "changed"),
        ("How many minutes are there in 15 hours?", "How many minutes are there really in 15 hours?", "changed"),
        ("How many minutes are there in 15 hours?", "How many are in 15 hours? Minutes, I mean.", ""),
        ("法国大革命是在哪一年爆发的？", "老师问我们法国大革命是在哪一年爆发的，我不知道。", "ngram"),
        ("ใครเป็นผู้แต่งเรื่องพระอภัยมณี", "ครูถามว่า ใครเป็นผู้แต่งเรื่องพระอภัยมณี ค่ะ", "contained"),
        ("มหาวิทยาลัยเชียงใหม่ก่อตั้งขึ้นเมื่อใดและโดยใคร", "ผมเรียนที่มหาวิทยาลัยเชียงใหม่และชอบมาก", ""),
    ],
)
def test_one_question(question: str, text: str, rule: str):
    assert find_rules([question, "Something else altogether?"], [text]) == [rule]


def test_a_word_by_which_questions_of_the_set_differ_makes_another_question():
    texts = ["What is the capital city of Norway?", "What is the capital port of France?"]
    assert find_rules(["What is the capital city of France?"], texts) == ["changed", "changed"]
    assert find_rules(["What is the capital city of France?", "What is the capital city of Peru?"], texts) == [
        "",
        "changed",
    ]


def test_a_question_of_many_rows_is_no_question_of_its_own():
    rows = [{"question": "Which of the statements below is true?", "choices": [f"a{i} b", f"c{i} d"]} for i in range(5)]
    text = "Well. Which of the statements below is true? Red is blue. Blue is red."
    assert find_leaks(create_evaluations(rows), [text]) == {}
    assert find_leaks(create_evaluations(rows[:1]), [text]) == {0: "contained"}


def test_a_turn_among_others_and_a_question_that_is_quoted_by_the_assistant():
    def build_chat(*turns: str) -> Conversation:
        return Conversation(tuple(Message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)))

    rows = [
        build_chat("Hi", "Hello!", "WHO PAINTED GUERNICA", "Picasso."),
        build_chat("Make a quiz.", "1. Who painted Guernica?\n2. Who composed Carmen?"),
        build_chat("Hi", "Hello!"),
    ]
    assert find_leaks(create_evaluations([{"question": "Who painted Guernica?"}]), rows) == {
        0: "contained",
        1: "contained",
    }


@pytest.mark.parametrize(
    ("lengths", "width"),
    [([3] * 100, MIN_WIDTH), ([50] * 100, MAX_WIDTH), ([10] * 10 + [40] * 90, 10), ([], MAX_WIDTH)],
)
def test_the_width_is_the_fifth_percentile_of_the_lengths(lengths: list[int], width: int):
    assert choose_run_width(pa.array(lengths, pa.int64()).to_numpy()) == width


def test_a_shorter_run_counts_in_a_set_of_short_rows():
    draw = random.Random(0)
    words = [f"w{draw.randrange(10**6)}" for _ in range(40)]
    rows = [{"question": " ".join(words[i:end]) + "?"} for i, end in ((0, 8), (8, 20), (20, 32))]
    part = "so " + " ".join(words[10:18]) + " they say"
    assert find_leaks(create_evaluations(rows), [part]) == {0: "ngram"}
    assert find_leaks(create_evaluations([{"question": " ".join(words)}]), [part]) == {}


@pytest.mark.parametrize("size", [1, 7, 1 << 16, 70_000])
def test_hashes_of_runs_are_the_same_wherever_they_stand(size: int):
    text = "Don't add 3, 4 and x + 5 to 1,000.5!"
    prefix = "lorem ipsum " * (size // 12 + 1)
    (alone,), (inside,) = ([*iter_word_blocks(pa.array([sample]))] for sample in (text, f"{prefix}{text.upper()} 7"))
    count = len(alone)
    start = len(inside) - 1 - count
    assert alone.hash_runs_between(alone.first[:1], alone.first[1:]) == inside.hash_runs_between(
        inside.first[:1] + start, inside.first[1:] - 1
    )
    altered_texts = [text.replace("x + 5", "x * 5"), text.replace("3, 4", "34"), text.replace("Don't", "Do")]
    for (altered,) in ([*iter_word_blocks(pa.array([sample]))] for sample in altered_texts):
        assert alone.hash_runs_between(alone.first[:1], alone.first[1:]) != altered.hash_runs_between(
            altered.first[:1], altered.first[1:]
        )


def test_everyday_words_say_less():
    (block,) = iter_word_blocks(pa.array(["Who are you", "Who wrote Hamlet", "12", "中国"]))
    weights = [int(weigh_words(block)[a:b].sum()) for a, b in zip(block.first[:-1], block.first[1:], strict=True)]
    assert weights == [9, 25, 12, 12]


def test_keys_of_texts_without_words():
    # The word "Question" alone is a prompt.
    assert len(hash_training_prompts(pa.array(["", None, "!?", "Question:"])).key) == 1
    assert len(hash_evaluation_questions(pa.array(["", None, "?!"])).key) == 0
