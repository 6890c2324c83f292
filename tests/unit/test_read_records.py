"""Every shape is the same records in every format, plain and packed; a row without one is told the nearest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from record_reads import read_records
from written import PACKERS, TABLES, WRITERS, write

from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Message, Preference
from align.data.read.columns import ColumnRules, find_shape_name
from align.data.read.content import to_content_row
from align.data.read.drops import BadRows, Drop
from align.data.read.records import ParsedRecord, read_documents, read_preferences

U, A = Message("user", "q"), Message("assistant", "a")
B, S = Message("assistant", "b"), Message("system", "s")


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def node(name: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "message_tree_id": "t1", "role": role, "text": text, **more}


FLAT_TREE = [
    node("1", None, "prompter", "q"), node("2", "1", "assistant", "a"), node("3", "1", "assistant", "b"),
    node("4", "2", "prompter", "q"), node("5", "4", "assistant", "b", lang="en"), node("6", "3", "prompter", "q"),
]  # fmt: skip
NESTED_TREE = {
    "message_tree_id": "t1",
    "prompt": {"role": "prompter", "text": "q", "replies": [
        {"role": "assistant", "text": "a", "replies": [
            {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "b", "replies": []}]}]},
        {"role": "assistant", "text": "b", "replies": [{"role": "prompter", "text": "q", "replies": []}]},
    ]},
}  # fmt: skip
TREE = [{"messages": [said("user", "q"), said("assistant", "a"), said("user", "q"), said("assistant", "b")]}]
ONE = [{"messages": [said("user", "q"), said("assistant", "a")]}]
WITH_SYSTEM = [{"messages": [said("system", "s"), said("user", "q"), said("assistant", "a")]}]
PAIR = [{"prompt": [said("user", "q")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}]
ORCA = [{**PAIR[0], "prompt": [said("system", "s"), said("user", "q")]}]
LIKED = [{"prompt": [said("user", "q")], "completion": [said("assistant", "a")], "label": True}]
DISLIKED = [{**LIKED[0], "label": False}]
PARTS = [{"type": "text", "text": "a"}]

SHAPES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "messages": (ONE, ONE),
    "system": ([{**ONE[0], "system": "s"}], WITH_SYSTEM),
    "parts": ([{"messages": [said("user", [{"type": "text", "text": "q"}]), said("assistant", PARTS)]}], ONE),
    "ShareGPT": ([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}], ONE),
    "Alpaca": ([{"instruction": "q", "input": "", "output": "a"}], ONE),
    "Alpaca with history": ([{"instruction": "q", "output": "b", "history": [["q", "a"]]}], TREE),
    "prompt": ([{"prompt": "q", "completion": "a"}], ONE),
    "prompt of messages": ([{"prompt": [said("user", "q")], "completion": [said("assistant", "a")]}], ONE),
    "question": ([{"question": "q", "answer": "a"}], ONE),
    "OpenOrca": ([{"system_prompt": "s", "question": "q", "response": "a"}], WITH_SYSTEM),
    "query": ([{"query": "q", "response": "a"}], ONE),
    "text": ([{"text": "q"}], [{"text": "q"}]),
    "a flat tree": (FLAT_TREE, TREE),
    "a tree": ([NESTED_TREE], TREE),
    "TRL": ([{"prompt": "q", "chosen": "a", "rejected": "b"}], PAIR),
    "HH": ([{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}], PAIR),
    "UltraFeedback": (
        [{"chosen": [said("user", "q"), said("assistant", "a")], "prompt": "q", "score_chosen": 3.5,
          "rejected": [said("user", "q"), said("assistant", "b")], "score_rejected": 1.0}], PAIR,
    ),
    "HelpSteer": ([{"prompt": "q", "response": t, "helpfulness": n} for t, n in (("b", 1), ("a", 3))], PAIR),
    "HelpSteer3": (
        [{"context": [said("user", "q")], "response1": "a", "response2": "b", "overall_preference": -2}], PAIR,
    ),
    "arena": ([{"conversation_a": [said("user", "q"), said("assistant", "b")], "winner": "model_b",
                "conversation_b": [said("user", "q"), said("assistant", "a")]}], PAIR),
    "two answers": ([{"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"}], PAIR),
    "Nectar": ([{"prompt": "q", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}]}], PAIR),
    "Orca": ([{"system": "s", "question": "q", "chosen": "a", "rejected": "b"}], ORCA),
    "KTO": ([{"prompt": "q", "completion": "a", "label": False}], DISLIKED),
    "KTO of messages": ([{"messages": [said("user", "q"), said("assistant", "a")], "label": True}], LIKED),
    "KTO of turns": (
        [{"prompt": [said("user", "q")], "completion": [said("assistant", "a")], "label": True, "id": "x"}], LIKED,
    ),
}  # fmt: skip
"""Name of a shape → rows of it, and what they say."""
NOT_IN_TABLES = ("a tree",)


def records(path: Path, **more: Any) -> list[ParsedRecord]:
    bad_rows = BadRows()
    found = list(read_records(str(path), bad_rows=bad_rows, **more))
    bad_rows.report_refused_rows(path, len(found))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WRITERS)
def test_every_shape_in_every_format_is_what_it_is_in_json_lines(tmp_path: Path, name: str, shape: str) -> None:
    rows, expected = SHAPES[shape]
    if name in TABLES and shape in NOT_IN_TABLES:
        return
    for packed in PACKERS:
        found = records(write(tmp_path, name, rows, packed))
        assert [to_content_row(read.record) for read in found] == expected
        assert [read.number for read in found] == [len(rows)] * len(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_a_name(shape: str) -> None:
    assert find_shape_name(SHAPES[shape][0][0])
    assert find_shape_name({"a": 1}) == ""


def test_kinds_have_their_types_and_figures(tmp_path: Path) -> None:
    rows = [SHAPES[name][0][0] for name in ("messages", "UltraFeedback", "KTO", "text", "Nectar")]
    found = records(write(tmp_path, "d.jsonl", rows))
    assert [type(read.record) for read in found] == [Conversation, Preference, Feedback, str, Preference]
    assert [read.number for read in found] == [1, 2, 3, 4, 5]
    pair = found[1].record
    assert isinstance(pair, Preference)
    assert (pair.margin, pair.id, pair.source) == (2.5, "d:2", "d")
    assert found[0].record == Conversation((U, A), "d.jsonl:1")
    assert found[2].record == Feedback((U,), (A,), False, "d.jsonl:3")


def test_what_else_a_row_has_is_kept_beside_its_record(tmp_path: Path) -> None:
    more = {"split": "test", "group": 7, "created_at": "2026-01-01", "ok": True, "list": [1], "none": None}
    kept = {"split": "test", "group": 7, "created_at": "2026-01-01", "ok": True}
    for shape, (rows, _) in SHAPES.items():
        first = records(write(tmp_path, "d.jsonl", [{**row, **more} for row in rows]))[0]
        assert kept.items() <= first.extra.items(), shape
        assert not first.extra.keys() & {"list", "none", "prompt", "text", "messages", "system"}
    path = write(tmp_path, "d.jsonl", [{"text": "a", "label": "spam"}])
    (label,) = records(path, rules=ColumnRules(metadata=["label"]))
    assert (label.record, label.extra, label.metadata) == ("a", {"label": "spam"}, {"label": "spam"})
    (tree,) = records(write(tmp_path, "d.jsonl", FLAT_TREE))
    assert tree.extra == {"message_tree_id": "t1", "lang": "en", "group_id": "t1"}


def test_records_go_on_behind_the_last_that_was_read(tmp_path: Path) -> None:
    rows = [row for name in ("HelpSteer", "a flat tree", "text", "Nectar", "a flat tree") for row in SHAPES[name][0]]
    rows[9:] = [{**row, "message_tree_id": "t2"} if "message_tree_id" in row else row for row in rows[9:]]
    path = write(tmp_path, "d.jsonl", rows)
    whole = records(path)
    assert [read.number for read in whole] == [2, 8, 9, 10, 16]
    for i, read in enumerate(whole):
        assert records(path, skip=read.number) == whole[i + 1 :]


def test_columns_are_mapped_before_a_row_is_recognised(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", [{"ask": "q", "say": "a", "note": "n", "prompt": "other"}])
    (found,) = records(path, rules=ColumnRules({"prompt": "ask", "completion": "say"}))
    assert (found.record, found.extra) == (Conversation((U, A), "d.jsonl:1"), {"note": "n"})
    assert found.metadata == {"note": "n", "prompt": "other"}
    (swapped,) = records(write(tmp_path, "d.jsonl", [{"prompt": "a", "completion": "q"}]),
                         rules=ColumnRules({"prompt": "completion", "completion": "prompt"}))  # fmt: skip
    assert swapped.record == found.record
    with pytest.raises(
        InputError, match=r"row 1, columns=ask, say: there is no asked among them to rename to prompt"
    ) as caught:
        records(write(tmp_path, "d.jsonl", [{"ask": "q", "say": "a"}]), rules=ColumnRules({"prompt": "asked"}))
    assert "d.jsonl" in caught.value.field


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "completon": "a"}, None),
        ({"prompt": "q", "answer": "a"}, "a question and its answer, which also needs `question`"),
        ({"question": "q", "output": "a"}, "Alpaca, which also needs `instruction`"),
        ({"prompt": "q", "chosen": "a"}, "preference pairs, which also needs `rejected`"),
        ({"prompt": "q", "rejected": "a", "chosen": None}, "preference pairs, which also needs `chosen`"),
        ({"mesages": []}, "messages (OpenAI), which also needs `messages` (is it `mesages`?)"),
        ({"context": "q", "response1": "a", "response2": "b"}, "HelpSteer3, which also needs `overall_preference`"),
        ({"answer": "a"}, "a question and its answer, which also needs `question`"),
        ({"a": 1}, ""), ({}, ""), ({"text": None}, ""),
    ],
)  # fmt: skip
def test_a_row_without_a_shape_names_the_nearest(tmp_path: Path, row: dict[str, Any], told: str | None) -> None:
    path = write(tmp_path, "d.jsonl", [row])
    if told is None:  # a question alone is a row to be asked
        assert isinstance(records(path)[0].record, Conversation)
        return
    with pytest.raises(InputError, match="row 1, columns=") as caught:
        records(path)
    assert all(name in str(caught.value) for name in row)
    assert caught.value.remedy.startswith(f"The nearest shape is {told}" if told else "docs/")


def test_drops_are_counted_and_bad_rows_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "response": "a", "helpfulness": 1},
        {"prompt": "x", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}, {"a": 1},
        *FLAT_TREE, {"text": "kept"},
    ]  # fmt: skip
    drops, bad_rows = Counter[Drop](), BadRows(skips=True)
    found = list(read_records(str(write(tmp_path, "d.jsonl", rows)), bad_rows=bad_rows, drops=drops))
    assert [read.number for read in found] == [10, 11]
    assert drops == {Drop.IDENTICAL: 1, Drop.UNPAIRED: 1, Drop.TIE: 1, Drop.UNANSWERED: 1}
    with pytest.raises(InputError, match="row 4"):
        bad_rows.report_refused_rows("d", 0)


# Trees.


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([*FLAT_TREE[:2], node("9", "8", "assistant", "b")], "row 3, parent_id=8: is the message_id of no"),
        ([*FLAT_TREE, {"text": "between"}, node("7", "6", "assistant", "a")], "row 8, parent_id=6: is the message_id"),
        ([*FLAT_TREE, FLAT_TREE[1]], "row 7, message_id=2: stands twice"),
        ([FLAT_TREE[0], node("2", "3", "assistant", "a"), node("3", "2", "prompter", "q")], "circle"),
        ([node("1", None, "robot", "q")], "row 1, role=robot: is none of"),
        ([node("1", None, "prompter", "q"), node("2", "1", "assistant", " ")], r"row 2, text=' ': is empty"),
        ([node("1", None, "prompter", "q"), node("2", "1", "tool", "4")], "row 2, role=tool: trees with tool calls"),
        ([{"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant"}]}}],
         r"row 1, prompt\.replies\[0\]\.text=None: is empty"),
        ([{"role": "prompter", "text": "q", "replies": "a"}], "row 1, replies=a: is no list"),
    ],
)  # fmt: skip
def test_a_tree_that_does_not_hang_together_is_told(tmp_path: Path, rows: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        records(write(tmp_path, "d.jsonl", rows))


def test_trees_follow_one_another_and_messages_of_one_in_any_order(tmp_path: Path) -> None:
    other = [{**row, "message_tree_id": "t2"} for row in FLAT_TREE]
    found = records(write(tmp_path, "d.jsonl", [*FLAT_TREE[::-1], *other]))
    assert [(read.number, read.extra["group_id"]) for read in found] == [(6, "t1"), (12, "t2")]
    assert [to_content_row(read.record) for read in found] == TREE * 2
    nameless = [{k: v for k, v in row.items() if k != "message_tree_id"} for row in FLAT_TREE]
    found = records(write(tmp_path, "d.jsonl", [*nameless, *nameless]))  # a root begins the next
    assert [(read.number, read.extra["group_id"]) for read in found] == [(6, "d.jsonl:1"), (12, "d.jsonl:7")]


def test_paths_come_in_the_order_of_the_replies(tmp_path: Path) -> None:
    found = records(write(tmp_path, "d.jsonl", FLAT_TREE[:3]))
    assert [read.record for read in found] == [Conversation((U, A), "d.jsonl:2"), Conversation((U, B), "d.jsonl:3")]


def test_what_was_deleted_is_left_out_with_its_replies(tmp_path: Path) -> None:
    rows = [{**row, "deleted": row["message_id"] == "2"} for row in FLAT_TREE[:5]]
    drops: Counter[Drop] = Counter()
    found = records(write(tmp_path, "d.jsonl", rows), drops=drops)
    assert [read.record for read in found] == [Conversation((U, B), "d.jsonl:3")]
    assert drops == {Drop.DELETED: 1}


def test_a_refused_row_is_told_where_all_others_were_dropped(tmp_path: Path) -> None:
    deleted = [{**row, "deleted": True} for row in FLAT_TREE[:5]]
    path = write(tmp_path, "d.jsonl", [*deleted, {"nothing": 1}])
    with pytest.raises(InputError, match="nothing"):
        read_documents(path, skip_bad_rows=True)


def test_a_tree_of_thousands_of_turns_is_walked(tmp_path: Path) -> None:
    rows = [node(str(i), str(i - 1) if i else None, ("prompter", "assistant")[i % 2], "q") for i in range(3000)]
    (found,) = records(write(tmp_path, "d.jsonl", rows))
    assert isinstance(found.record, Conversation)
    assert len(found.record.messages) == 3000


def test_stages_read_trees_and_questions_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in ("a flat tree", "a tree", "question", "OpenOrca"):
        rows, expected = SHAPES[shape]
        assert list(map(to_content_row, read_documents(write(tmp_path, "d.parquet", rows)))) == expected
    assert "left out 1 path of" in capsys.readouterr().out
    for shape in ("Orca", "HelpSteer"):
        rows, expected = SHAPES[shape]
        assert list(map(to_content_row, read_preferences(write(tmp_path, "d.csv", rows)))) == expected


# What would be read as something else than it is.


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": "q", "answer": "a", "context": 3}, "context"),
        ({"query": "q", "response": "a", "options": [["x"]]}, "options"),
        ({"question": "q", "answer": "a", "response": "b"}, "question"), ({"question": "q", "answer": 3}, "answer"),
        ({"prompt": "q", "completion": "a", "label": False}, "label"),
        ({"messages": [said("user", [{"type": "image_url", "image_url": {}}])]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [said("user", [{**PARTS[0], "image_url": "u"}])]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [said("user", ["q"])]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [said("user", "q"), said("assistant", [])]}, r"messages\[1\]\.content"),
    ],
)  # fmt: skip
def test_rows_to_imitate_that_say_more_are_refused(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"row 1, {field}="):
        read_documents(write(tmp_path, "d.jsonl", [row]))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [said("user", "q")], "label": True}, "ends with a user turn"),
        ({"messages": [said("assistant", "a")], "label": True}, "no question"),
        ({"prompt": " ", "completion": "a", "label": True}, "no question"),
    ],
)  # fmt: skip
def test_feedback_on_nothing_is_refused(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        records(write(tmp_path, "d.jsonl", [row]))


def test_feedback_on_an_empty_answer_and_on_several_turns_is_kept(tmp_path: Path) -> None:
    turns = [said("assistant", "a"), said("user", "q"), said("assistant", "b")]
    rows = [{"prompt": "q", "completion": "", "label": False}, {"prompt": "q", "completion": turns, "label": True}]
    first, second = (read.record for read in records(write(tmp_path, "d.jsonl", rows)))
    assert first == Feedback((U,), (Message("assistant", ""),), False, "d.jsonl:1")
    assert second == Feedback((U,), (A, U, B), True, "d.jsonl:2")


def test_a_column_that_is_a_number_here_and_a_text_there_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": text} for text in ("a", 3)]
    with pytest.raises(InputError, match=r"row 2, completion=3: is a number, and a text is read here"):
        records(write(tmp_path, "d.jsonl", rows))
