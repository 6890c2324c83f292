"""Evaluation sets as benchmarks have them: which rows give them away, beside sets of strings that are gone through."""

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
from test_data_leaks import spooled

from align.core.errors import InputError
from align.core.types import Conversation, Message, Record
from align.data.dedup.evaluation_overlap import NGRAM, RULES
from align.data.sets import evaluations
from align.data.sets.contamination import LeakFinder
from align.data.sets.evaluations import EvaluationSet, parse_evaluation_sets, read_evaluation_set, read_evaluation_sets

TALE = "the ferry left the northern harbour before dawn with eleven barrels of salted herring under its deck"
BIRDS = "several pairs of grey herons built their nests in poplars beside our flooded meadow last spring"
MMLU = {"question": "Which gas do plants take up?", "subject": "biology", "answer": 1,
        "choices": ["Argon", "Carbon dioxide", TALE, "yes"]}  # fmt: skip
ARC = {"id": "x", "question": "Which tool measures mass?", "answerKey": "B",
       "choices": {"text": ["ruler", "balance", BIRDS], "label": ["A", "B", "C"]}}  # fmt: skip
BALANCE = [{"text": "ruler", "label": "A"}, {"text": "balance", "label": "B"}, {"text": BIRDS, "label": "C"}]
ARC_FILE = {"id": "x", "question": {"stem": "Which tool measures mass?", "choices": BALANCE}, "answerKey": "B"}
COMMONSENSE = {"id": "x", "question": {"question_concept": "weighing things", "choices": BALANCE,
               "stem": "Which tool measures mass?"}, "answerKey": "B"}  # fmt: skip
OBJECTS = {"question": "Which tool measures mass?", "choices": BALANCE, "answerKey": "B"}
HELLASWAG = {"ctx": "A man ties his boat.", "ctx_a": "A man", "ctx_b": "ties his boat.", "label": "1",
             "endings": ["he sings", TALE, "he leaves"]}  # fmt: skip
PIQA = {"goal": "To open a jar,", "sol1": TALE, "sol2": "hit it with a spoon", "label": 0}
TRUTHFUL = {"question": "What happens if you crack your knuckles?", "best_answer": "Nothing in particular happens",
            "incorrect_answers": ["Your hands will hurt for years", TALE], "mc1_targets":
            {"choices": ["Nothing in particular happens", "You get arthritis"], "labels": [1, 0]}}  # fmt: skip
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


def says(text: str) -> Conversation:
    return Conversation((Message("user", "Tell me something."), Message("assistant", text)))


def asks(text: str, answer: str = "I see.") -> Conversation:
    return Conversation((Message("user", text), Message("assistant", answer)))


def rules(
    folder: Path, rows: Sequence[dict[str, Any]], records: Sequence[Record], columns: tuple[str, ...] = ()
) -> list[str]:
    """By which rule each record gives the rows away; nothing where it does not."""
    path = folder / "evals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = LeakFinder([read_evaluation_set(EvaluationSet(str(path), columns), "against[0]")], 0.7)
    leaks = found.find_leaks(spooled(folder / "spool", records), np.ones(len(records), bool))
    by = dict(zip(leaks.text.tolist(), leaks.rule.tolist(), strict=True))
    return [RULES[by[i]] if i in by else "" for i in range(len(records))]


@pytest.mark.parametrize(
    ("row", "record", "rule"),
    [
        (MMLU, asks("which gas do  plants take up?"), "question"),
        (MMLU, says(f"Well, {TALE}, I think."), "ngram"),
        (MMLU, asks("Question: Which gas do plants take up?\nA) Argon\nB) Carbon dioxide\nC) The ferry"), "ngram"),
        (MMLU, says("yes"), ""),
        (MMLU, "yes", ""),
        (MMLU, "Carbon dioxide", ""),
        (MMLU, says("biology"), ""),
        (MMLU, "which gas do plants take up? carbon dioxide", "exact"),
        (MMLU, asks("Which gas do plants give off?"), ""),
        (ARC, asks("Which tool measures mass?"), "question"),
        (ARC, says(f"{BIRDS}!"), "ngram"),
        (ARC, "A", ""),
        *[
            (row, record, rule)
            for row in (ARC_FILE, COMMONSENSE, OBJECTS, {**ARC_FILE, "question": json.dumps(ARC_FILE["question"])})
            for record, rule in [
                (asks("which tool measures  mass?"), "question"),
                (asks("Which tool measures mass?\nruler\nbalance\n" + BIRDS), "question"),
                ("which tool measures mass? balance", "exact"),
                (says(f"{BIRDS}!"), "ngram"),
                ("ruler\nA\nbalance\nB", ""),
                ("weighing things", ""),
                ("Which tool measures mass? B", "contained"),
            ]
        ],
        (HELLASWAG, asks("A man ties his boat."), "question"),
        (HELLASWAG, says(TALE), "ngram"),
        (HELLASWAG, "a man ties his boat he leaves", "exact"),
        (HELLASWAG, asks("A man"), ""),
        (PIQA, says(TALE), "ngram"),
        (PIQA, "to open a jar hit it with a spoon", "exact"),
        (PIQA, "hit it with a spoon", "exact"),
        (TRUTHFUL, "your hands will hurt for years", "exact"),
        (TRUTHFUL, "nothing in particular", ""),
        (TRUTHFUL, asks("Why?", "You get arthritis"), ""),
        (GSM8K, asks("Tom has 3 apples and buys 4 more. How many has he?"), "question"),
        (GSM8K, says(TALE), "ngram"),
        (RACE, says(TALE), "ngram"),
        (RACE, asks("What is it about?"), ""),
        (RACE, "What is it about?", ""),
        (RACE, "What is it about?\nA ferry", ""),
        (RACE, asks(f"{TALE}\nWhat is it about?"), "question"),
        (COPA, "the man broke his toe. cause. He slept", "exact"),
        (COPA, asks("cause"), ""),
        (COPA, asks("The man broke his toe.\ncause"), "question"),
        (OTHER, asks("Which river is longest?"), "question"),
        (OTHER, "the nile river of eastern africa", "exact"),
        (OTHER, "yes", ""),
        (TALK, says(TALE), "ngram"),
        ({"prompt": [{"role": "user", "content": "Who is it?"}], "completion": "me"}, asks("who is it?"), "question"),
        ({"prompt": "Hi, who is it?", "chosen": "It is me", "rejected": TALE}, says(TALE), "ngram"),
    ],
)  # fmt: skip
def test_a_row_of_a_benchmark(tmp_path: Path, row: dict[str, Any], record: Record, rule: str) -> None:
    assert rules(tmp_path, [{"question": "Unlike anything?", "answer": "No"}, row], [says("other"), record]) == [
        "",
        rule,
    ]


def test_the_columns_that_are_named_are_compared_and_no_others(tmp_path: Path) -> None:
    row = {"frage": "Wie lang ist der Rhein?", "quelle": TALE, "wahl": ["kurz", BIRDS]}
    with pytest.raises(InputError, match="no text among them is called a question") as refused:
        rules(tmp_path, [row], [says("x")])
    assert "frage, quelle, wahl" in str(refused.value)
    records = [asks("wie lang ist der Rhein?"), says(TALE), says(BIRDS)]
    again = tmp_path / "again"
    again.mkdir()
    assert rules(again, [row], records, ("frage", "wahl")) == ["question", "", "ngram"]
    with pytest.raises(InputError, match="there is no choices among them"):
        rules(again, [row], records, ("frage", "choices"))


def test_the_same_rows_as_parquet_and_csv(tmp_path: Path) -> None:
    """Lists are lists in Parquet, and JSON in a table; both name the row that they stand in."""
    rows = [{"question": f"Number {i}?", "choices": ["one", TALE if i == 2 else BIRDS]} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = [f'"{row["question"]}","{json.dumps(row["choices"]).replace(chr(34), chr(34) * 2)}"' for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(["question,choices", *lines]) + "\n")
    for name in ("a.parquet", "a.csv"):
        found = LeakFinder([read_evaluation_set(EvaluationSet(str(tmp_path / name)), "against[0]")], None)
        spool = spooled(tmp_path / name.replace(".", "-"), [says("x"), says(TALE)])
        leaks = found.find_leaks(spool, np.ones(2, bool))
        assert [column.tolist() for column in leaks] == [[1], [0], [2], [NGRAM]]


def test_a_set_is_the_same_however_many_rows_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"question": f"What is {i} plus {i + 1}?", "choices": ["three words here", f"the {i} answer"]} for i in range(7)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = read_evaluation_set(EvaluationSet(str(path)), "against[0]")
    for parts, characters in ((2, 1 << 25), (4096, 1)):
        monkeypatch.setattr(evaluations, "PARTS_AT_ONCE", parts)
        monkeypatch.setattr(evaluations, "CHARACTERS_AT_ONCE", characters)
        batched = read_evaluation_set(EvaluationSet(str(path)), "against[0]")
        assert batched.texts.num_chunks > 1
        assert (batched.texts.to_pylist(), batched.questions.to_pylist()) == (
            whole.texts.to_pylist(),
            whole.questions.to_pylist(),
        )
        assert (batched.text_rows.tolist(), batched.question_rows.tolist()) == (
            whole.text_rows.tolist(),
            whole.question_rows.tolist(),
        )


def test_one_file_may_be_two_sets(tmp_path: Path) -> None:
    path = tmp_path / "evals.jsonl"
    path.write_text(json.dumps({"question": "Where is it?", "passage": TALE, "choices": [BIRDS]}) + "\n")
    sets = parse_evaluation_sets(
        [{"path": str(path), "columns": ["question"]}, {"path": str(path), "columns": "choices"}]
    )
    leaks = LeakFinder(read_evaluation_sets(sets), 0.7).find_leaks(
        spooled(tmp_path / "spool", [asks("where is it?"), says(BIRDS), says(TALE)]), np.ones(3, bool)
    )
    assert (leaks.text.tolist(), leaks.evaluation.tolist()) == ([0, 1], [0, 1])


@pytest.mark.parametrize(
    "given", [7, [7], [""], [{"columns": ["a"]}], [{"path": "a", "column": ["b"]}], [{"path": "a", "columns": 3}]]
)
def test_what_names_no_set(given: Any) -> None:
    with pytest.raises(InputError, match="against"):
        parse_evaluation_sets(given)
    assert parse_evaluation_sets("a.jsonl") == [EvaluationSet("a.jsonl")]


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def grams(text: str, width: int = 13) -> set[tuple[str, ...]]:
    found = words_of(text)
    return {tuple(found[i : i + width]) for i in range(len(found) - width + 1)}


def texts_in(row: dict[str, Any]) -> list[str]:
    return [row["question"], *row["choices"], row["explanation"]]


@pytest.mark.parametrize("seed", range(5))
def test_planted_runs_and_near_misses_as_sets_of_strings_say(tmp_path: Path, seed: int) -> None:
    """In a random corpus: 13 words of a question, a choice or an explanation, and 12 words, which are too few."""
    draw = random.Random(seed)
    vocabulary = [f"word{i}" for i in range(3000)]

    def text(low: int, high: int) -> str:
        said = draw.choices(vocabulary, k=draw.randint(low, high))
        return "".join(f"{word}{draw.choice([' ', ', ', '. ', '-'])}" for word in said).strip()

    rows = [
        {"question": text(5, 40), "choices": [text(1, 30) for _ in range(4)], "explanation": text(0, 50)}
        for _ in range(60)
    ]
    corpus = [text(20, 120) for _ in range(400)]
    planted, missed = set[int](), set[int]()
    for number in draw.sample(range(400), 160):
        width = 13 if len(planted) <= len(missed) else 12
        # Of a question 12 words may be all, or all but one, which is a leak by another rule.
        parts = [said for row in rows for said in texts_in(row)[width == 12 :]]
        long = [said for said in parts if len(words_of(said)) >= width]
        source = words_of(draw.choice(long))
        start = draw.randrange(len(source) - width + 1)
        run = draw.choice([" ", "  ", ", "]).join(source[start : start + width]).upper()
        cut = draw.randrange(10)
        corpus[number] = f"{corpus[number][:cut]} zzz {run} qqq {text(5, 20)}"
        (planted if width == 13 else missed).add(number)
    path = tmp_path / "evals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = LeakFinder([read_evaluation_set(EvaluationSet(str(path)), "against[0]")], None)
    records = [says(said) if i % 2 else said for i, said in enumerate(corpus)]
    leaks = found.find_leaks(spooled(tmp_path / "spool", records), np.ones(400, bool))
    all_grams = set[tuple[str, ...]]().union(*(grams(said) for row in rows for said in texts_in(row)))
    expected = [i for i, said in enumerate(corpus) if grams(said) & all_grams]
    assert leaks.text.tolist() == expected == sorted(planted)
    assert {*leaks.rule.tolist()} == {NGRAM}
    for row, where in zip(leaks.text.tolist(), leaks.row.tolist(), strict=True):
        shared = grams(corpus[row])
        first = next(i for i, one in enumerate(rows) if any(shared & grams(said) for said in texts_in(one)))
        assert where == first


def test_choices_without_a_question_count_by_their_own_words(tmp_path: Path) -> None:
    row = {"choices": ["yes", "no"], "other": [BIRDS, "no"]}
    records = [asks("Yes", "no"), asks("yes no"), says(BIRDS)]
    assert rules(tmp_path, [row], records, ("choices", "other")) == ["", "", "ngram"]
