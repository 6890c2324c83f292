"""Items of several turns: each system goes on from its own answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from benches import Bench, lines, results

from align.run import read_manifest

LETTER, NOTHING = {"kind": "regex", "pattern": "[a-z]"}, {"kind": "exact", "answers": ["no such answer"]}
ROWS: tuple[Mapping[str, Any], ...] = (
    {"id": "both", "turns": ["Say hello.", "And again?"], "check": [LETTER, LETTER]},
    {"id": "first", "turns": ["Say yes.", "Why?"], "check": [LETTER, None]},
    {"id": "last", "turns": ["Say no.", "Why?", "Really?"], "check": NOTHING},
    {"id": "one", "prompt": "Say it.", "check": LETTER},
)
TWO = "stage.systems={new: ppo:p, old: sft:s}"


def test_a_system_goes_on_from_its_own_answers(bench: Bench):
    run = bench.run(TWO, bench.tasks(*ROWS), "run.name=turns")
    rows = {row["id"]: row for row in lines(run)}
    for id, turns in (("both", 2), ("first", 2), ("last", 3), ("one", 1)):
        for answer in rows[id]["answers"].values():
            roles = [turn["role"] for turn in answer.get("before", ())]
            assert roles == ["assistant", "user"] * (turns - 1)
    assert rows["last"]["answers"]["new"]["before"][1]["content"] == "Why?"
    asked = sum(len(row.get("turns", [1])) for row in ROWS)
    assert read_manifest(run).metrics["answers_made"] == 2 * asked
    # What stands in the evidence, given as a conversation, is the very question that was asked.
    for who, ref in (("new", "ppo:p"), ("old", "sft:s")):
        talks = [
            {"id": id, "messages": [*row["prompt"], *row["answers"][who].get("before", ())], "check": LETTER}
            for id, row in rows.items()
        ]
        talks = [talk for talk in talks if "\\u0000" not in json.dumps(talk)]  # which no row may hold
        assert any(len(talk["messages"]) > 1 for talk in talks)
        again = bench.run(f"stage.systems={{it: {ref}, other: {{file: {answers(bench, talks)}}}}}",
                          bench.tasks(*talks, name=f"talks_{who}"), f"run.name=again-{who}")  # fmt: skip
        assert read_manifest(again).metrics["answers_made"] == 0
        assert {row["id"]: row["answers"]["it"]["text"] for row in lines(again)} == {
            talk["id"]: rows[talk["id"]]["answers"][who]["text"] for talk in talks
        }
    assert bench.run(TWO, bench.tasks(*ROWS), "run.name=turns-again", "rollout.batch_size=1").exists()


def answers(bench: Bench, rows: list[dict[str, Any]]) -> str:
    path = bench.folder / "other.jsonl"
    path.write_text("".join(json.dumps({"id": row["id"], "answer": "x"}) + "\n" for row in rows))
    return str(path)


def test_a_check_for_each_turn_or_one_of_the_last(bench: Bench):
    said = bench.folder / "said.jsonl"
    texts = {
        "both": ["hello", "HELLO"],
        "first": ["yes", "BECAUSE"],
        "last": ["a", "b", "no such answer"],
        "one": ["x"],
    }
    said.write_text("".join(json.dumps({"id": id, "answer": text}) + "\n" for id, text in texts.items()))
    run = bench.run(f"stage.systems={{theirs: {{file: {said}}}, s: sft:s}}", bench.tasks(*ROWS), "run.name=said")
    told = {row["id"]: row["answers"]["theirs"] for row in lines(run)}
    assert {id: one["score"] for id, one in told.items()} == {"both": 0, "first": 1, "last": 1, "one": 1}
    assert next(iter(told["both"]["missed"])).startswith("turn 2: ")
    lengths = results(run)["tasks"]["asked"]["systems"]["theirs"]["characters"]
    assert lengths == sum(len(text) for each in texts.values() for text in each) / 4
    assert "user: And again?" in (run / "report.html").read_text()


def test_a_judge_reads_all_turns(bench: Bench):
    rows = [{key: value for key, value in row.items() if key != "check"} for row in ROWS]
    said = bench.folder / "said.jsonl"
    said.write_text(
        "".join(json.dumps({"id": r["id"], "answer": ["x"] * len(r.get("turns", [1]))}) + "\n" for r in rows)
    )
    judge = ("reward=rules", "reward.rules=[{rule: regex, pattern: e, weight: 1.0}]")
    run = bench.run(f"stage.systems={{s: sft:s, f: {{file: {said}}}}}", bench.tasks(*rows), "run.name=read", *judge)
    for row in lines(run):
        for answer in row["answers"].values():
            assert answer["score"] == float("e" in answer["text"])  # a rule reads the answer alone


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"turns": []}, "is no list of questions"),
        ({"turns": "What?"}, "is no list of questions"),
        ({"turns": ["What?", " "]}, "is no list of questions"),
        ({"turns": ["What?"], "prompt": "Why?"}, "stands beside prompt"),
        ({"turns": ["What?", "Why?"], "check": [LETTER]}, "has 1 checks for 2 turns"),
        ({"turns": ["What?", "Why?"], "check": [None, None]}, "has no check"),
        ({"turns": ["What?", "Why?"], "check": [None, {"kind": "exact"}]}, "check[1]"),
    ],
)
def test_rows_that_are_refused(bench: Bench, row: Mapping[str, Any], problem: str):
    assert problem in bench.refused(TWO, bench.tasks(row))


def test_a_file_answers_every_turn(bench: Bench):
    said = bench.folder / "said.jsonl"
    said.write_text("".join(json.dumps({"id": row["id"], "answer": "yes"}) + "\n" for row in ROWS))
    refused = bench.refused(f"stage.systems={{theirs: {{file: {said}}}, s: sft:s}}", bench.tasks(*ROWS))
    assert "has 1 answer to item both of task asked, in 2 turns" in refused


def test_an_item_that_grows_too_long_is_asked_of_nobody(bench: Bench):
    long = {"id": "long", "turns": ["Say hello.", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 8, "Go on."]}
    rows = [{**long, "check": LETTER}, ROWS[0]]
    run = bench.run(TWO, bench.tasks(*rows), "run.name=long")
    assert [row["id"] for row in lines(run)] == ["both"]
    assert results(run)["tasks"]["asked"]["dropped"] == 1
