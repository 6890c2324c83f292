"""Evaluation sets in the shapes of benchmarks: rows that leak them, compared with a search through sets of strings."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_leaks import write_spool

from align.core.errors import InputError
from align.core.types import Conversation, Message, Record
from align.data.dedup.evaluation_overlap import NGRAM, RULES
from align.data.sets import evaluations
from align.data.sets.contamination import LeakFinder
from align.data.sets.evaluations import EvaluationSet, parse_evaluation_sets, read_evaluation_set, read_evaluation_sets

TALE = "the ferry left the northern harbour before dawn with eleven barrels of salted herring under its deck"
BIRDS = "several pairs of grey herons built their nests in poplars beside our flooded meadow last spring"
MMLU = {
    "question": "Which gas do plants take up?",
    "subject": "biology",
    "answer": 1,
    "choices": ["Argon", "Carbon dioxide", TALE, "yes"],
}
ARC = {
    "id": "x",
    "question": "Which tool measures mass?",
    "answerKey": "B",
    "choices": {"text": ["ruler", "balance", BIRDS], "label": ["A", "B", "C"]},
}
BALANCE = [{"text": "ruler", "label": "A"}, {"text": "balance", "label": "B"}, {"text": BIRDS, "label": "C"}]
ARC_FILE = {"id": "x", "question": {"stem": "Which tool measures mass?", "choices": BALANCE}, "answerKey": "B"}
COMMONSENSE = {
    "id": "x",
    "question": {"question_concept": "weighing things", "choices": BALANCE, "stem": "Which tool measures mass?"},
    "answerKey": "B",
}
OBJECTS = {"question": "Which tool measures mass?", "choices": BALANCE, "answerKey": "B"}
HELLASWAG = {
    "ctx": "A man ties his boat.",
    "ctx_a": "A man",
    "ctx_b": "ties his boat.",
    "label": "1",
    "endings": ["he sings", TALE, "he leaves"],
}
PIQA = {"goal": "To open a jar,", "sol1": TALE, "sol2": "hit it with a spoon", "label": 0}
TRUTHFUL = {
    "question": "What happens if you crack your knuckles?",
    "best_answer": "Nothing in particular happens",
    "incorrect_answers": ["Your hands will hurt for years", TALE],
    "mc1_targets": {"choices": ["Nothing in particular happens", "You get arthritis"], "labels": [1, 0]},
}
GSM8K = {"question": "Tom has 3 apples and buys 4 more. How many has he?", "answer": f"3 + 4 = 7, for {TALE}. #### 7"}
RACE = {"article": TALE, "question": "What is it about?", "options": ["A ferry", "A train"], "answer": "A"}
COPA = {
    "premise": "The man broke his toe.",
    "question": "cause",
    "choice1": "He dropped a hammer.",
    "choice2": "He slept.",
}
TALK = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": TALE}]}
OTHER = {
    "Question": "Which river is longest?",
    "Correct Answer": "The Nile river of eastern Africa",
    "Incorrect Answer 1": "yes",
}


def build_answer(text: str) -> Conversation:
    return Conversation((Message("user", "Tell me something."), Message("assistant", text)))


def build_exchange(text: str, answer: str = "I see.") -> Conversation:
    return Conversation((Message("user", text), Message("assistant", answer)))


def find_rules(
    folder: Path, rows: Sequence[dict[str, Any]], records: Sequence[Record], columns: tuple[str, ...] = ()
) -> list[str]:
    """Return the rule by which each record leaks the rows, or an empty string."""
    path = folder / "evals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    finder = LeakFinder([read_evaluation_set(EvaluationSet(str(path), columns), "against[0]")], 0.7)
    leaks = finder.find_leaks(write_spool(folder / "spool", records), np.ones(len(records), bool))
    rule_names = dict(zip(leaks.text.tolist(), leaks.rule.tolist(), strict=True))
    return [RULES[rule_names[i]] if i in rule_names else "" for i in range(len(records))]


@pytest.mark.parametrize(
    ("row", "record", "rule"),
    [
        (MMLU, build_exchange("which gas do  plants take up?"), "question"),
        (MMLU, build_answer(f"Well, {TALE}, I think."), "ngram"),
        (
            MMLU,
            build_exchange("Question: Which gas do plants take up?\nA) Argon\nB) Carbon dioxide\nC) The ferry"),
            "ngram",
        ),
        (MMLU, build_answer("yes"), ""),
        (MMLU, "yes", ""),
        (MMLU, "Carbon dioxide", ""),
        (MMLU, build_answer("biology"), ""),
        (MMLU, "which gas do plants take up? carbon dioxide", "exact"),
        (MMLU, build_exchange("Which gas do plants give off?"), ""),
        (ARC, build_exchange("Which tool measures mass?"), "question"),
        (ARC, build_answer(f"{BIRDS}!"), "ngram"),
        (ARC, "A", ""),
        *[
            (row, record, rule)
            for row in (ARC_FILE, COMMONSENSE, OBJECTS, {**ARC_FILE, "question": json.dumps(ARC_FILE["question"])})
            for record, rule in [
                (build_exchange("which tool measures  mass?"), "question"),
                (build_exchange("Which tool measures mass?\nruler\nbalance\n" + BIRDS), "question"),
                ("which tool measures mass? balance", "exact"),
                (build_answer(f"{BIRDS}!"), "ngram"),
                ("ruler\nA\nbalance\nB", ""),
                ("weighing things", ""),
                ("Which tool measures mass? B", "contained"),
            ]
        ],
        (HELLASWAG, build_exchange("A man ties his boat."), "question"),
        (HELLASWAG, build_answer(TALE), "ngram"),
        (HELLASWAG, "a man ties his boat he leaves", "exact"),
        (HELLASWAG, build_exchange("A man"), ""),
        (PIQA, build_answer(TALE), "ngram"),
        (PIQA, "to open a jar hit it with a spoon", "exact"),
        (PIQA, "hit it with a spoon", "exact"),
        (TRUTHFUL, "your hands will hurt for years", "exact"),
        (TRUTHFUL, "nothing in particular", ""),
        (TRUTHFUL, build_exchange("Why?", "You get arthritis"), ""),
        (GSM8K, build_exchange("Tom has 3 apples and buys 4 more. How many has he?"), "question"),
        (GSM8K, build_answer(TALE), "ngram"),
        (RACE, build_answer(TALE), "ngram"),
        (RACE, build_exchange("What is it about?"), ""),
        (RACE, "What is it about?", ""),
        (RACE, "What is it about?\nA ferry", ""),
        (RACE, build_exchange(f"{TALE}\nWhat is it about?"), "question"),
        (COPA, "the man broke his toe. cause. He slept", "exact"),
        (COPA, build_exchange("cause"), ""),
        (COPA, build_exchange("The man broke his toe.\ncause"), "question"),
        (OTHER, build_exchange("Which river is longest?"), "question"),
        (OTHER, "the nile river of eastern africa", "exact"),
        (OTHER, "yes", ""),
        (TALK, build_answer(TALE), "ngram"),
        (
            {"prompt": [{"role": "user", "content": "Who is it?"}], "completion": "me"},
            build_exchange("who is it?"),
            "question",
        ),
        ({"prompt": "Hi, who is it?", "chosen": "It is me", "rejected": TALE}, build_answer(TALE), "ngram"),
    ],
)
def test_a_row_of_a_benchmark(tmp_path: Path, row: dict[str, Any], record: Record, rule: str) -> None:
    assert find_rules(
        tmp_path, [{"question": "Unlike anything?", "answer": "No"}, row], [build_answer("other"), record]
    ) == [
        "",
        rule,
    ]


def test_the_columns_that_are_named_are_compared_and_no_others(tmp_path: Path) -> None:
    row = {"frage": "Wie lang ist der Rhein?", "quelle": TALE, "wahl": ["kurz", BIRDS]}
    with pytest.raises(InputError, match="none of its text columns has the name of a question") as refused:
        find_rules(tmp_path, [row], [build_answer("x")])
    assert "frage, quelle, wahl" in str(refused.value)
    records = [build_exchange("wie lang ist der Rhein?"), build_answer(TALE), build_answer(BIRDS)]
    folder = tmp_path / "again"
    folder.mkdir()
    assert find_rules(folder, [row], records, ("frage", "wahl")) == ["question", "", "ngram"]
    with pytest.raises(InputError, match="there is no choices among them"):
        find_rules(folder, [row], records, ("frage", "choices"))


def test_the_same_rows_as_parquet_and_csv(tmp_path: Path) -> None:
    """Lists are lists in Parquet, and JSON in CSV. Leaks of both name their row."""
    rows = [{"question": f"Number {i}?", "choices": ["one", TALE if i == 2 else BIRDS]} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = [f'"{row["question"]}","{json.dumps(row["choices"]).replace(chr(34), chr(34) * 2)}"' for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["question,choices", *lines]) + "\n")
    for name in ("a.parquet", "a.csv"):
        finder = LeakFinder([read_evaluation_set(EvaluationSet(str(tmp_path / name)), "against[0]")], None)
        spool = write_spool(tmp_path / name.replace(".", "-"), [build_answer("x"), build_answer(TALE)])
        leaks = finder.find_leaks(spool, np.ones(2, bool))
        assert [column.tolist() for column in leaks] == [[1], [0], [2], [NGRAM]]


def test_a_set_is_the_same_however_many_rows_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"question": f"What is {i} plus {i + 1}?", "choices": ["three words here", f"the {i} answer"]} for i in range(7)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = read_evaluation_set(EvaluationSet(str(path)), "against[0]")
    for parts, characters in ((2, 1 << 25), (4096, 1)):
        monkeypatch.setattr(evaluations, "PARTS_AT_ONCE", parts)
        monkeypatch.setattr(evaluations, "CHARACTERS_AT_ONCE", characters)
        batched = read_evaluation_set(EvaluationSet(str(path)), "against[0]")
        assert batched.texts.num_chunks > 1
        assert (batched.texts.to_pylist(), batched.questions.to_pylist()) == (
            expected.texts.to_pylist(),
            expected.questions.to_pylist(),
        )
        assert (batched.text_rows.tolist(), batched.question_rows.tolist()) == (
            expected.text_rows.tolist(),
            expected.question_rows.tolist(),
        )


def test_one_file_may_be_two_sets(tmp_path: Path) -> None:
    path = tmp_path / "evals.jsonl"
    path.write_text(json.dumps({"question": "Where is it?", "passage": TALE, "choices": [BIRDS]}) + "\n")
    sets = parse_evaluation_sets(
        [{"path": str(path), "columns": ["question"]}, {"path": str(path), "columns": "choices"}]
    )
    leaks = LeakFinder(read_evaluation_sets(sets), 0.7).find_leaks(
        write_spool(tmp_path / "spool", [build_exchange("where is it?"), build_answer(BIRDS), build_answer(TALE)]),
        np.ones(3, bool),
    )
    assert (leaks.text.tolist(), leaks.evaluation.tolist()) == ([0, 1], [0, 1])


@pytest.mark.parametrize(
    "given", [7, [7], [""], [{"columns": ["a"]}], [{"path": "a", "column": ["b"]}], [{"path": "a", "columns": 3}]]
)
def test_what_names_no_set(given: Any) -> None:
    with pytest.raises(InputError, match="against"):
        parse_evaluation_sets(given)
    assert parse_evaluation_sets("a.jsonl") == [EvaluationSet("a.jsonl")]


def split_words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def collect_grams(text: str, width: int = 13) -> set[tuple[str, ...]]:
    words = split_words(text)
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


def collect_texts(row: dict[str, Any]) -> list[str]:
    return [row["question"], *row["choices"], row["explanation"]]


@pytest.mark.parametrize("seed", range(5))
def test_planted_runs_and_near_misses_as_sets_of_strings_say(tmp_path: Path, seed: int) -> None:
    """Plant runs of 13 words of the set in a random corpus, which are leaks, and of 12 words, which are too few."""
    draw = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(3000)]

    def build_text(low: int, high: int) -> str:
        words = draw.choices(vocabulary, k=draw.randint(low, high))
        return "".join(f"{word}{draw.choice([' ', ', ', '. ', '-'])}" for word in words).strip()

    rows = [
        {
            "question": build_text(5, 40),
            "choices": [build_text(1, 30) for _ in range(4)],
            "explanation": build_text(0, 50),
        }
        for _ in range(60)
    ]
    corpus = [build_text(20, 120) for _ in range(400)]
    planted = set[int]()
    near_misses = set[int]()
    for number in draw.sample(range(400), 160):
        width = 13 if len(planted) <= len(near_misses) else 12
        # 12 words may be a whole question, or all but one of its words, which is a leak by another rule.
        parts = [text for row in rows for text in collect_texts(row)[width == 12 :]]
        long_texts = [text for text in parts if len(split_words(text)) >= width]
        source = split_words(draw.choice(long_texts))
        start = draw.randrange(len(source) - width + 1)
        run = draw.choice([" ", "  ", ", "]).join(source[start : start + width]).upper()
        cut = draw.randrange(10)
        corpus[number] = f"{corpus[number][:cut]} zzz {run} qqq {build_text(5, 20)}"
        (planted if width == 13 else near_misses).add(number)
    path = tmp_path / "evals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finder = LeakFinder([read_evaluation_set(EvaluationSet(str(path)), "against[0]")], None)
    records = [build_answer(text) if i % 2 else text for i, text in enumerate(corpus)]
    leaks = finder.find_leaks(write_spool(tmp_path / "spool", records), np.ones(400, bool))
    all_grams = set[tuple[str, ...]]().union(*(collect_grams(text) for row in rows for text in collect_texts(row)))
    expected = [i for i, text in enumerate(corpus) if collect_grams(text) & all_grams]
    assert leaks.text.tolist() == expected == sorted(planted)
    assert {*leaks.rule.tolist()} == {NGRAM}
    for row, leaked_row in zip(leaks.text.tolist(), leaks.row.tolist(), strict=True):
        shared = collect_grams(corpus[row])
        first_row = next(
            i
            for i, candidate in enumerate(rows)
            if any(shared & collect_grams(text) for text in collect_texts(candidate))
        )
        assert leaked_row == first_row


def test_choices_without_a_question_count_by_their_own_words(tmp_path: Path) -> None:
    row = {"choices": ["yes", "no"], "other": [BIRDS, "no"]}
    records = [build_exchange("Yes", "no"), build_exchange("yes no"), build_answer(BIRDS)]
    assert find_rules(tmp_path, [row], records, ("choices", "other")) == ["", "", "ngram"]
