"""Items of several turns: each system continues from its own answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from suite_evaluations import RuleEvaluations, read_artifact_rows, read_results

from align.run import read_manifest

LETTER = {"kind": "regex", "pattern": "[a-z]"}
NOTHING = {"kind": "exact", "answers": ["no such answer"]}
ROWS: tuple[Mapping[str, Any], ...] = (
    {"id": "both", "turns": ["Say hello.", "And again?"], "check": [LETTER, LETTER]},
    {"id": "first", "turns": ["Say yes.", "Why?"], "check": [LETTER, None]},
    {"id": "last", "turns": ["Say no.", "Why?", "Really?"], "check": NOTHING},
    {"id": "one", "prompt": "Say it.", "check": LETTER},
)
TWO = "stage.systems={new: ppo:p, old: sft:s}"


def test_a_system_goes_on_from_its_unshared_seed(bench: RuleEvaluations):
    unshared_seed = "seed=7"  # no other test asks for them
    run = bench.run(TWO, bench.tasks(*ROWS), "run.name=turns", unshared_seed)
    rows = {row["id"]: row for row in read_artifact_rows(run)}
    for id, turns in (("both", 2), ("first", 2), ("last", 3), ("one", 1)):
        for answer in rows[id]["answers"].values():
            roles = [turn["role"] for turn in answer.get("before", ())]
            assert roles == ["assistant", "user"] * (turns - 1)
    assert rows["last"]["answers"]["new"]["before"][1]["content"] == "Why?"
    turn_count = sum(len(row.get("turns", [1])) for row in ROWS)
    assert read_manifest(run).metrics["answers_made"] == 2 * turn_count
    # The recorded conversation, given as a prompt, is the same question: its answer is reused.
    talks = [
        {"id": id, "messages": [*row["prompt"], *row["answers"]["new"].get("before", ())], "check": LETTER}
        for id, row in rows.items()
    ]
    talks = [talk for talk in talks if "\\u0000" not in json.dumps(talk)]  # a row may not contain it
    assert any(len(talk["messages"]) > 1 for talk in talks)
    file = bench.file("other.jsonl", [{"id": talk["id"], "answer": "x"} for talk in talks])
    systems = f"stage.systems={{it: ppo:p, other: {{file: {file}}}}}"
    replayed = bench.run(systems, bench.tasks(*talks, name="talks"), "run.name=again", unshared_seed)
    assert read_manifest(replayed).metrics["answers_made"] == 0
    for row in read_artifact_rows(replayed):
        assert row["answers"]["it"]["text"] == rows[row["id"]]["answers"]["new"]["text"]


def test_a_check_for_each_turn_or_one_of_the_last(bench: RuleEvaluations):
    texts = {
        "both": ["hello", "HELLO"],
        "first": ["yes", "BECAUSE"],
        "last": ["a", "b", "no such answer"],
        "one": ["x"],
    }
    file = bench.file("said.jsonl", [{"id": id, "answer": text} for id, text in texts.items()])
    systems = f"stage.systems={{theirs: {{file: {file}}}, s: sft:s}}"
    run = bench.run(systems, bench.tasks(*ROWS), "run.name=said")
    answers = {row["id"]: row["answers"]["theirs"] for row in read_artifact_rows(run)}
    assert {id: answer["score"] for id, answer in answers.items()} == {"both": 0, "first": 1, "last": 1, "one": 1}
    assert next(iter(answers["both"]["missed"])).startswith("turn 2: ")
    lengths = read_results(run)["tasks"]["asked"]["systems"]["theirs"]["characters"]
    assert lengths == sum(len(text) for replies in texts.values() for text in replies) / 4
    assert "user: And again?" in (run / "report.html").read_text()
    bench.file("said.jsonl", [{"id": row["id"], "answer": "yes"} for row in ROWS])
    assert "has 1 answer to item both of task asked, in 2 turns" in bench.expect_error(systems, bench.tasks(*ROWS))


def test_an_item_that_grows_too_long_is_asked_of_nobody(bench: RuleEvaluations):
    long_row = {
        "id": "long",
        "turns": ["Say hello.", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 8, "Go on."],
    }
    rows = [{**long_row, "check": LETTER}, ROWS[0]]
    run = bench.run(TWO, bench.tasks(*rows), "run.name=long")
    assert [row["id"] for row in read_artifact_rows(run)] == ["both"]
    assert read_results(run)["tasks"]["asked"]["dropped"] == 1
