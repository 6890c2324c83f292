"""Rows of every shape give the same records in every file format; a row without a shape is refused with the nearest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from record_reads import read_records
from row_formats import PACKERS, TABLES, WRITERS, write_row_file

from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Message, Preference
from align.data.read.column_rules import ColumnRules
from align.data.read.content import to_content_row
from align.data.read.drops import BadRows, Drop
from align.data.read.records import ParsedRecord, read_documents, read_preferences
from align.data.read.shapes import find_shape_name

U = Message("user", "q")
A = Message("assistant", "a")
B = Message("assistant", "b")
S = Message("system", "s")


def make_message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def make_node(name: str, parent: str | None, role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "message_tree_id": "t1", "role": role, "text": text, **more}


FLAT_TREE = [
    make_node("1", None, "prompter", "q"),
    make_node("2", "1", "assistant", "a"),
    make_node("3", "1", "assistant", "b"),
    make_node("4", "2", "prompter", "q"),
    make_node("5", "4", "assistant", "b", lang="en"),
    make_node("6", "3", "prompter", "q"),
]
NESTED_TREE = {
    "message_tree_id": "t1",
    "prompt": {
        "role": "prompter",
        "text": "q",
        "replies": [
            {
                "role": "assistant",
                "text": "a",
                "replies": [
                    {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "b", "replies": []}]}
                ],
            },
            {"role": "assistant", "text": "b", "replies": [{"role": "prompter", "text": "q", "replies": []}]},
        ],
    },
}
TREE = [
    {
        "messages": [
            make_message("user", "q"),
            make_message("assistant", "a"),
            make_message("user", "q"),
            make_message("assistant", "b"),
        ]
    }
]
ONE = [{"messages": [make_message("user", "q"), make_message("assistant", "a")]}]
WITH_SYSTEM = [{"messages": [make_message("system", "s"), make_message("user", "q"), make_message("assistant", "a")]}]
PAIR = [
    {
        "prompt": [make_message("user", "q")],
        "chosen": [make_message("assistant", "a")],
        "rejected": [make_message("assistant", "b")],
    }
]
ORCA = [{**PAIR[0], "prompt": [make_message("system", "s"), make_message("user", "q")]}]
LIKED = [{"prompt": [make_message("user", "q")], "completion": [make_message("assistant", "a")], "label": True}]
DISLIKED = [{**LIKED[0], "label": False}]
PARTS = [{"type": "text", "text": "a"}]

SHAPES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "messages": (ONE, ONE),
    "system": ([{**ONE[0], "system": "s"}], WITH_SYSTEM),
    "parts": (
        [{"messages": [make_message("user", [{"type": "text", "text": "q"}]), make_message("assistant", PARTS)]}],
        ONE,
    ),
    "ShareGPT": ([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}], ONE),
    "Alpaca": ([{"instruction": "q", "input": "", "output": "a"}], ONE),
    "Alpaca with history": ([{"instruction": "q", "output": "b", "history": [["q", "a"]]}], TREE),
    "prompt": ([{"prompt": "q", "completion": "a"}], ONE),
    "prompt of messages": (
        [{"prompt": [make_message("user", "q")], "completion": [make_message("assistant", "a")]}],
        ONE,
    ),
    "question": ([{"question": "q", "answer": "a"}], ONE),
    "OpenOrca": ([{"system_prompt": "s", "question": "q", "response": "a"}], WITH_SYSTEM),
    "query": ([{"query": "q", "response": "a"}], ONE),
    "text": ([{"text": "q"}], [{"text": "q"}]),
    "a flat tree": (FLAT_TREE, TREE),
    "a tree": ([NESTED_TREE], TREE),
    "TRL": ([{"prompt": "q", "chosen": "a", "rejected": "b"}], PAIR),
    "HH": ([{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}], PAIR),
    "UltraFeedback": (
        [
            {
                "chosen": [make_message("user", "q"), make_message("assistant", "a")],
                "prompt": "q",
                "score_chosen": 3.5,
                "rejected": [make_message("user", "q"), make_message("assistant", "b")],
                "score_rejected": 1.0,
            }
        ],
        PAIR,
    ),
    "HelpSteer": ([{"prompt": "q", "response": t, "helpfulness": n} for t, n in (("b", 1), ("a", 3))], PAIR),
    "HelpSteer3": (
        [{"context": [make_message("user", "q")], "response1": "a", "response2": "b", "overall_preference": -2}],
        PAIR,
    ),
    "arena": (
        [
            {
                "conversation_a": [make_message("user", "q"), make_message("assistant", "b")],
                "winner": "model_b",
                "conversation_b": [make_message("user", "q"), make_message("assistant", "a")],
            }
        ],
        PAIR,
    ),
    "two answers": ([{"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"}], PAIR),
    "Nectar": ([{"prompt": "q", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}]}], PAIR),
    "Orca": ([{"system": "s", "question": "q", "chosen": "a", "rejected": "b"}], ORCA),
    "KTO": ([{"prompt": "q", "completion": "a", "label": False}], DISLIKED),
    "KTO of messages": (
        [{"messages": [make_message("user", "q"), make_message("assistant", "a")], "label": True}],
        LIKED,
    ),
    "KTO of turns": (
        [
            {
                "prompt": [make_message("user", "q")],
                "completion": [make_message("assistant", "a")],
                "label": True,
                "id": "x",
            }
        ],
        LIKED,
    ),
}
"""Name of a shape → example rows and the content rows that they parse to."""
NOT_IN_TABLES = ("a tree",)


def read_all(path: Path, **more: Any) -> list[ParsedRecord]:
    bad_rows = BadRows()
    parsed = list(read_records(str(path), bad_rows=bad_rows, **more))
    bad_rows.report_refused_rows(path, len(parsed))
    return parsed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WRITERS)
def test_every_shape_in_every_format_is_what_it_is_in_json_lines(tmp_path: Path, name: str, shape: str) -> None:
    rows, expected = SHAPES[shape]
    if name in TABLES and shape in NOT_IN_TABLES:
        return
    for packed in PACKERS:
        parsed = read_all(write_row_file(tmp_path, name, rows, packed))
        assert [to_content_row(item.record) for item in parsed] == expected
        assert [item.number for item in parsed] == [len(rows)] * len(parsed)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_a_name(shape: str) -> None:
    assert find_shape_name(SHAPES[shape][0][0])
    assert find_shape_name({"a": 1}) == ""


def test_kinds_have_their_types_and_figures(tmp_path: Path) -> None:
    rows = [SHAPES[name][0][0] for name in ("messages", "UltraFeedback", "KTO", "text", "Nectar")]
    parsed = read_all(write_row_file(tmp_path, "d.jsonl", rows))
    assert [type(item.record) for item in parsed] == [Conversation, Preference, Feedback, str, Preference]
    assert [item.number for item in parsed] == [1, 2, 3, 4, 5]
    pair = parsed[1].record
    assert isinstance(pair, Preference)
    assert (pair.margin, pair.id, pair.source) == (2.5, "d:2", "d")
    assert parsed[0].record == Conversation((U, A), "d.jsonl:1")
    assert parsed[2].record == Feedback((U,), (A,), False, "d.jsonl:3")


def test_what_else_a_row_has_is_kept_beside_its_record(tmp_path: Path) -> None:
    columns = {"split": "test", "group": 7, "created_at": "2026-01-01", "ok": True, "list": [1], "none": None}
    expected = {"split": "test", "group": 7, "created_at": "2026-01-01", "ok": True}
    for shape, (rows, _) in SHAPES.items():
        first = read_all(write_row_file(tmp_path, "d.jsonl", [{**row, **columns} for row in rows]))[0]
        assert expected.items() <= first.extra.items(), shape
        assert not first.extra.keys() & {"list", "none", "prompt", "text", "messages", "system"}
    path = write_row_file(tmp_path, "d.jsonl", [{"text": "a", "label": "spam"}])
    (label,) = read_all(path, rules=ColumnRules(metadata=["label"]))
    assert (label.record, label.extra, label.metadata) == ("a", {"label": "spam"}, {"label": "spam"})
    (tree,) = read_all(write_row_file(tmp_path, "d.jsonl", FLAT_TREE))
    assert tree.extra == {"message_tree_id": "t1", "lang": "en", "group_id": "t1"}


def test_records_go_on_behind_the_last_that_was_read(tmp_path: Path) -> None:
    rows = [row for name in ("HelpSteer", "a flat tree", "text", "Nectar", "a flat tree") for row in SHAPES[name][0]]
    rows[9:] = [{**row, "message_tree_id": "t2"} if "message_tree_id" in row else row for row in rows[9:]]
    path = write_row_file(tmp_path, "d.jsonl", rows)
    parsed = read_all(path)
    assert [item.number for item in parsed] == [2, 8, 9, 10, 16]
    for i, item in enumerate(parsed):
        assert read_all(path, skip=item.number) == parsed[i + 1 :]


def test_columns_are_mapped_before_a_row_is_recognised(tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{"ask": "q", "say": "a", "note": "n", "prompt": "other"}])
    (mapped,) = read_all(path, rules=ColumnRules({"prompt": "ask", "completion": "say"}))
    assert (mapped.record, mapped.extra) == (Conversation((U, A), "d.jsonl:1"), {"note": "n"})
    assert mapped.metadata == {"note": "n", "prompt": "other"}
    (swapped,) = read_all(
        write_row_file(tmp_path, "d.jsonl", [{"prompt": "a", "completion": "q"}]),
        rules=ColumnRules({"prompt": "completion", "completion": "prompt"}),
    )
    assert swapped.record == mapped.record
    with pytest.raises(
        InputError, match=r"row 1, columns=ask, say: there is no asked among them to rename to prompt"
    ) as caught:
        read_all(
            write_row_file(tmp_path, "d.jsonl", [{"ask": "q", "say": "a"}]), rules=ColumnRules({"prompt": "asked"})
        )
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
        ({"a": 1}, ""),
        ({}, ""),
        ({"text": None}, ""),
    ],
)
def test_a_row_without_a_shape_names_the_nearest(tmp_path: Path, row: dict[str, Any], told: str | None) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [row])
    if told is None:  # a question alone is a prompt
        assert isinstance(read_all(path)[0].record, Conversation)
        return
    with pytest.raises(InputError, match="row 1, columns=") as caught:
        read_all(path)
    assert all(name in str(caught.value) for name in row)
    assert caught.value.remedy.startswith(f"The nearest shape is {told}" if told else "docs/")


def test_drops_are_counted_and_bad_rows_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "response": "a", "helpfulness": 1},
        {"prompt": "x", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
        {"a": 1},
        *FLAT_TREE,
        {"text": "kept"},
    ]
    drops = Counter[Drop]()
    bad_rows = BadRows(skips=True)
    parsed = list(read_records(str(write_row_file(tmp_path, "d.jsonl", rows)), bad_rows=bad_rows, drops=drops))
    assert [item.number for item in parsed] == [10, 11]
    assert drops == {Drop.IDENTICAL: 1, Drop.UNPAIRED: 1, Drop.TIE: 1, Drop.UNANSWERED: 1}
    with pytest.raises(InputError, match="row 4"):
        bad_rows.report_refused_rows("d", 0)


# Trees.


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            [*FLAT_TREE[:2], make_node("9", "8", "assistant", "b")],
            "row 3, parent_id=8: is the message_id of no neighbouring row",
        ),
        (
            [*FLAT_TREE, {"text": "between"}, make_node("7", "6", "assistant", "a")],
            "row 8, parent_id=6: is the message_id of no neighbouring row",
        ),
        ([*FLAT_TREE, FLAT_TREE[1]], "row 7, message_id=2: stands twice"),
        ([FLAT_TREE[0], make_node("2", "3", "assistant", "a"), make_node("3", "2", "prompter", "q")], "circle"),
        ([make_node("1", None, "robot", "q")], "row 1, role=robot: is none of"),
        ([make_node("1", None, "prompter", "q"), make_node("2", "1", "assistant", " ")], r"row 2, text=' ': is empty"),
        (
            [make_node("1", None, "prompter", "q"), make_node("2", "1", "tool", "4")],
            "row 2, role=tool: trees with tool calls",
        ),
        (
            [{"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant"}]}}],
            r"row 1, prompt\.replies\[0\]\.text=None: is empty",
        ),
        ([{"role": "prompter", "text": "q", "replies": "a"}], "row 1, replies=a: is no list"),
    ],
)
def test_a_tree_that_does_not_hang_together_is_told(tmp_path: Path, rows: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_all(write_row_file(tmp_path, "d.jsonl", rows))


def test_trees_follow_one_another_and_messages_of_one_in_any_order(tmp_path: Path) -> None:
    second_tree = [{**row, "message_tree_id": "t2"} for row in FLAT_TREE]
    parsed = read_all(write_row_file(tmp_path, "d.jsonl", [*FLAT_TREE[::-1], *second_tree]))
    assert [(item.number, item.extra["group_id"]) for item in parsed] == [(6, "t1"), (12, "t2")]
    assert [to_content_row(item.record) for item in parsed] == TREE * 2
    rows_without_tree_id = [{k: v for k, v in row.items() if k != "message_tree_id"} for row in FLAT_TREE]
    # A root begins the next tree.
    parsed = read_all(write_row_file(tmp_path, "d.jsonl", [*rows_without_tree_id, *rows_without_tree_id]))
    assert [(item.number, item.extra["group_id"]) for item in parsed] == [(6, "d.jsonl:1"), (12, "d.jsonl:7")]


def test_paths_come_in_the_order_of_the_replies(tmp_path: Path) -> None:
    parsed = read_all(write_row_file(tmp_path, "d.jsonl", FLAT_TREE[:3]))
    assert [item.record for item in parsed] == [Conversation((U, A), "d.jsonl:2"), Conversation((U, B), "d.jsonl:3")]


def test_what_was_deleted_is_left_out_with_its_replies(tmp_path: Path) -> None:
    rows = [{**row, "deleted": row["message_id"] == "2"} for row in FLAT_TREE[:5]]
    drops: Counter[Drop] = Counter()
    parsed = read_all(write_row_file(tmp_path, "d.jsonl", rows), drops=drops)
    assert [item.record for item in parsed] == [Conversation((U, B), "d.jsonl:3")]
    assert drops == {Drop.DELETED: 1}


def test_a_refused_row_is_told_where_all_others_were_dropped(tmp_path: Path) -> None:
    deleted = [{**row, "deleted": True} for row in FLAT_TREE[:5]]
    path = write_row_file(tmp_path, "d.jsonl", [*deleted, {"nothing": 1}])
    with pytest.raises(InputError, match="nothing"):
        read_documents(path, skip_bad_rows=True)


def test_a_tree_of_thousands_of_turns_is_walked(tmp_path: Path) -> None:
    rows = [make_node(str(i), str(i - 1) if i else None, ("prompter", "assistant")[i % 2], "q") for i in range(3000)]
    (parsed,) = read_all(write_row_file(tmp_path, "d.jsonl", rows))
    assert isinstance(parsed.record, Conversation)
    assert len(parsed.record.messages) == 3000


def test_stages_read_trees_and_questions_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in ("a flat tree", "a tree", "question", "OpenOrca"):
        rows, expected = SHAPES[shape]
        assert list(map(to_content_row, read_documents(write_row_file(tmp_path, "d.parquet", rows)))) == expected
    assert "left out 1 path of" in capsys.readouterr().out
    for shape in ("Orca", "HelpSteer"):
        rows, expected = SHAPES[shape]
        assert list(map(to_content_row, read_preferences(write_row_file(tmp_path, "d.csv", rows)))) == expected


# Rows that would be read as something else than they are.


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": "q", "answer": "a", "context": 3}, "context"),
        ({"query": "q", "response": "a", "options": [["x"]]}, "options"),
        ({"question": "q", "answer": "a", "response": "b"}, "question"),
        ({"question": "q", "answer": 3}, "answer"),
        ({"prompt": "q", "completion": "a", "label": False}, "label"),
        (
            {"messages": [make_message("user", [{"type": "image_url", "image_url": {}}])]},
            r"messages\[0\]\.content\[0\]",
        ),
        ({"messages": [make_message("user", [{**PARTS[0], "image_url": "u"}])]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [make_message("user", ["q"])]}, r"messages\[0\]\.content\[0\]"),
        ({"messages": [make_message("user", "q"), make_message("assistant", [])]}, r"messages\[1\]\.content"),
    ],
)
def test_rows_to_imitate_that_say_more_are_refused(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"row 1, {field}="):
        read_documents(write_row_file(tmp_path, "d.jsonl", [row]))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [make_message("user", "q")], "label": True}, "ends with a user turn"),
        ({"messages": [make_message("assistant", "a")], "label": True}, "no question"),
        ({"prompt": " ", "completion": "a", "label": True}, "no question"),
    ],
)
def test_feedback_on_nothing_is_refused(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_all(write_row_file(tmp_path, "d.jsonl", [row]))


def test_feedback_on_an_empty_answer_and_on_several_turns_is_kept(tmp_path: Path) -> None:
    turns = [make_message("assistant", "a"), make_message("user", "q"), make_message("assistant", "b")]
    rows = [{"prompt": "q", "completion": "", "label": False}, {"prompt": "q", "completion": turns, "label": True}]
    first, second = (item.record for item in read_all(write_row_file(tmp_path, "d.jsonl", rows)))
    assert first == Feedback((U,), (Message("assistant", ""),), False, "d.jsonl:1")
    assert second == Feedback((U,), (A, U, B), True, "d.jsonl:2")


def test_a_column_that_is_a_number_here_and_a_text_there_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": text} for text in ("a", 3)]
    with pytest.raises(InputError, match=r"row 2, completion=3: is a number, but a text is expected"):
        read_all(write_row_file(tmp_path, "d.jsonl", rows))
