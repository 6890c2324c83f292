"""Rows in common shapes become the same conversation; bad rows are all reported at once, or left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from json_lines import write_rows

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.read.drops import collect_drop_counts
from align.data.read.records import read_documents, read_preferences

TURNS = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
SYSTEM = Message("system", "s")


def build_share_gpt_row(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (build_share_gpt_row(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")), TURNS),
        (build_share_gpt_row(("user", "a"), ("assistant", "b"), ("human", "c"), ("chatgpt", "d")), TURNS),
        (build_share_gpt_row(("system", "s"), ("human", "a"), ("gpt", "b")), (SYSTEM, *TURNS[:2])),
        (build_share_gpt_row(("human", "a"), ("gpt", "b"), system="s", id=3), (SYSTEM, *TURNS[:2])),
        ({"conversations": [message.as_dict() for message in TURNS]}, TURNS),
        ({"instruction": "a", "input": "", "output": "b"}, TURNS[:2]),
        ({"instruction": "a", "input": None, "output": "b", "text": "### Instruction: …"}, TURNS[:2]),
        ({"instruction": "Sum up.", "input": "Text.", "output": "b"}, (Message("user", "Sum up.\nText."), TURNS[1])),
        ({"instruction": "", "input": "a", "output": "b"}, TURNS[:2]),
        ({"instruction": "c", "output": "d", "history": [["a", "b"]]}, TURNS),
        ({"instruction": "a", "output": "b", "history": [], "system": "s"}, (SYSTEM, *TURNS[:2])),
        ({"instruction": "a"}, TURNS[:1]),
        ({"messages": None, "conversations": None, "prompt": "a", "completion": "b", "text": None}, TURNS[:2]),
        ({"prompt": None, "instruction": "a", "input": None, "output": "b"}, TURNS[:2]),
    ],
)
def test_the_shapes_of_others_are_conversations(tmp_path: Path, row: dict[str, Any], expected: tuple[Message, ...]):
    (document,) = read_documents(write_rows(tmp_path / "d.jsonl", [row]))
    assert isinstance(document, Conversation)
    assert document.messages == expected


def test_share_gpts_turns_keep_what_they_say_beside_their_text(tmp_path: Path):
    answer = {"from": "gpt", "value": "b", "reasoning_content": "Hm.", "train": False}
    (document,) = read_documents(
        write_rows(tmp_path / "d.jsonl", [{"conversations": [{"from": "human", "value": "a"}, answer]}])
    )
    assert isinstance(document, Conversation)
    assert document.messages[1] == Message("assistant", "<think>\nHm.\n</think>\n\nb", trained=False)


def test_an_answer_that_is_not_trained_on_may_say_nothing(tmp_path: Path):
    for empty in ({"content": ""}, {"content": None}, {}):
        silent = {"role": "assistant", "train": False, **empty}
        question = {"role": "user", "content": "a"}
        row = {"messages": [question, silent, question, {"role": "assistant", "content": "b"}]}
        (document,) = read_documents(write_rows(tmp_path / "d.jsonl", [row]))
        assert isinstance(document, Conversation)
        assert document.messages[1] == Message("assistant", "", trained=False)


def test_a_question_to_train_on_has_an_answer_beside_it(tmp_path: Path):
    """A row with a misspelt answer column is refused instead of being read as a bare question."""
    rows = [
        ({"prompt": "a", "completion_": "b"}, "completion"),
        ({"instruction": "a"}, "output"),
        ({"instruction": "c", "history": [["a", "b"]]}, "output"),
    ]
    for row, names in rows:
        path = write_rows(tmp_path / "d.jsonl", [{"prompt": "a", "completion": None}, row])
        assert len(read_documents(path)) == 2  # prompts need no answers
        with pytest.raises(InputError, match=rf"row 2, columns=.*: there is no answer among them\. Call it {names}"):
            read_documents(path, requires_answer=True)


# --- Rows that are refused

GOOD = {"prompt": "a", "completion": "b"}
SILENT = ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "  "})
MIXED = [GOOD, SILENT[0], {"a": 1}, {**GOOD, "tools": [1]}, SILENT[1], GOOD]


def write_mixed_rows(path: Path) -> Path:
    write_rows(path, MIXED)
    path.write_text(path.read_text() + "no json\n" + '{"prompt": "last", "completion": "b"}\n')
    return path


def test_an_error_tells_of_every_row_that_is_refused(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        read_documents(write_mixed_rows(tmp_path / "d.jsonl"))
    error = caught.value
    assert (error.field, error.value) == (f"{tmp_path}/d.jsonl, row 2, completion", "''")
    assert error.remedy.startswith("Give its text, leave the row out")
    assert (
        "4 rows more are refused. Of all: 2 × completion: the assistant's turn is empty (row 2); "
        "1 × columns: no row of a supported shape" in error.remedy
    )
    assert "is no schema of a tool: it names no function (row 4)" in error.remedy
    assert "1 × not a line of JSON in UTF-8 (row 7)" in error.remedy
    assert error.remedy.endswith("To leave such rows out: data.on_bad_row=skip.")


def test_rows_that_are_refused_are_left_out_and_counted_where_that_is_asked(tmp_path: Path, capsys: Any):
    with collect_drop_counts() as counts:
        documents = read_documents(write_mixed_rows(tmp_path / "d.jsonl"), skip_bad_rows=True)
    assert [document.id for document in documents if isinstance(document, Conversation)] == [
        "d.jsonl:1",
        "d.jsonl:6",
        "d.jsonl:8",
    ]
    assert counts == {"skipped_rows": 5}
    stdout = capsys.readouterr().out
    assert stdout.startswith(
        f"left out 5 rows of {tmp_path}/d.jsonl: 2 × completion: the assistant's turn is empty (row 2); "
    )


@pytest.mark.parametrize("skips", [False, True])
def test_a_file_of_nothing_else_is_refused_and_not_offered_to_be_skipped(tmp_path: Path, skips: bool):
    with pytest.raises(InputError, match="row 1, columns=a: no row of a supported shape") as caught:
        read_documents(write_rows(tmp_path / "d.jsonl", [{"a": 1}, {"b": 2}]), "data.path", skips)
    assert "1 row more is refused" in caught.value.remedy
    assert "on_bad_row" not in caught.value.remedy


def test_pairs_are_left_out_whole(tmp_path: Path, capsys: Any):
    """HelpSteer's neighbouring rows are read together: a bad one drops the pairs of its prompt, and no others."""
    rated_rows = [
        {"prompt": "q", "response": text, "helpfulness": score} for text, score in (("b", 1), ("c", 2), ("d", "x"))
    ]
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, *rated_rows, {"prompt": "a", "chosen": "b"}]
    path = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError, match=r"row 4, helpfulness=x: not a finite number.*1 row more"):
        read_preferences(path)
    with collect_drop_counts() as counts:
        pairs = read_preferences(path, skip_bad_rows=True)
    assert (len(pairs), counts) == (1, {"skipped_rows": 2, "dropped_undecided": 0})
    assert "1 × helpfulness: not a finite number (row 4); 1 × rejected: missing (row 5)" in capsys.readouterr().out
