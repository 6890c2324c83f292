"""Rows of a file: fields beside the texts, held-out rows, and files that are of another format or damaged."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from json_lines import write_rows
from test_sources import GOOD, build_numbered_rows, collect_questions, jsonl

from align.annotate.store.vote_selection import DEFAULT_SELECTION
from align.core.errors import InputError
from align.core.types import Conversation
from align.data.pairs import VoteSource, read_pairs, split_pairs
from align.data.read.records import read_documents
from align.data.sources import build_data_inputs, read_divided_documents, read_source_prompts

NO_VOTES = VoteSource("", "", DEFAULT_SELECTION)


def exchange(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Held-out rows: all of a file, or those of a file of their own.


def test_a_whole_file_is_trained_on_or_measured_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", build_numbered_rows(40))
    assert [len(side) for side in read_divided_documents(jsonl(path, held_out=0.0))] == [40, 0]
    assert len(read_source_prompts(jsonl(path, held_out=1.0), "test")) == 40


def test_a_file_of_its_own_is_measured_on_whole_and_never_trained_on(tmp_path: Path, capsys: Any) -> None:
    """Training rows with a question of the evaluation file are dropped and counted, even with another answer."""
    train = write_rows(tmp_path / "train.jsonl", build_numbered_rows(30))
    test = write_rows(
        tmp_path / "test.jsonl", [{**row, "completion": "Another."} for row in build_numbered_rows(40)[20:]]
    )
    data = jsonl(train, eval_path=str(test))
    first, second = read_divided_documents(data)
    assert (len(first), len(second)) == (20, 20)
    assert not collect_questions(first) & collect_questions(second)
    assert "10 rows of" in capsys.readouterr().out
    assert collect_questions(read_source_prompts(data, "test")) == collect_questions(second)
    assert collect_questions(read_source_prompts(data, "train")) == collect_questions(first)


def test_what_is_trained_on_is_not_read_to_measure(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n")
    test = write_rows(tmp_path / "test.jsonl", build_numbered_rows(5))
    assert len(read_source_prompts(jsonl(tmp_path / "bad.jsonl", eval_path=str(test)), "test")) == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("count", [2, 12, 40])
@pytest.mark.parametrize("held_out", [1e-6, 0.05, 0.5])
def test_what_an_evaluation_asks_is_in_no_pair_to_train_on(tmp_path: Path, count: int, held_out: float) -> None:
    """One question is held out even if the share amounts to less than one."""
    pairs = [{"prompt": f"question {count} {i}", "chosen": "a", "rejected": "b"} for i in range(count)]
    data = jsonl(write_rows(tmp_path / "d.jsonl", pairs), held_out=held_out)
    held_out_questions = {c.messages[0].content for c in read_source_prompts(data, "test")}
    assert held_out_questions
    prefs = read_pairs(data, NO_VOTES)
    try:
        train, _ = split_pairs(prefs, data, 0.1, 0)
    except InputError as error:
        assert count == 2
        assert "leaves no pair to train on" in str(error)  # noqa: PT017
        return
    assert not held_out_questions & {pref.prompt[0].content for pref in train}


def test_a_limit_draws_pairs_from_the_whole_file(tmp_path: Path) -> None:
    pairs = [{"prompt": f"question {i}", "chosen": "a", "rejected": "b"} for i in range(100)]
    data = jsonl(write_rows(tmp_path / "d.jsonl", pairs), limit=10)
    first, second = (read_pairs(data, NO_VOTES, seed) for seed in (0, 1))
    assert (len(first), len(second)) == (10, 10)
    assert first != second
    assert any(int(pref.prompt[0].content.split()[1]) > 20 for pref in first)


def test_errors_in_the_file_to_measure_on_name_it(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", build_numbered_rows(3))
    with pytest.raises(InputError, match=r"data\.eval_path=.*absent"):
        build_data_inputs(jsonl(train, eval_path=str(tmp_path / "absent.jsonl")))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"bad\.jsonl, row 1"):
        read_divided_documents(jsonl(train, eval_path=str(tmp_path / "bad.jsonl")))


def test_a_system_prompt_is_added_where_there_is_none_and_moves_no_row(tmp_path: Path) -> None:
    with_system = [{"messages": [{"role": "system", "content": "Own."}, *exchange("a", "b")]}]
    path = write_rows(tmp_path / "d.jsonl", [*build_numbered_rows(40), *with_system, {"text": "plain"}])
    without_system, with_default = (
        read_divided_documents(jsonl(path, system=system)) for system in (None, "Be brief.")
    )
    for before, after in zip(without_system, with_default, strict=True):
        assert [get_question(d) for d in before] == [get_question(d) for d in after]
        heads = {d.messages[0].content for d in after if not isinstance(d, str)}
        assert heads <= {"Be brief.", "Own."}
    assert "plain" in [*with_default[0], *with_default[1]]


# Fields beside the texts are kept, or refused by name.


def get_question(document: Any) -> str:
    return document if isinstance(document, str) else next(m.content for m in document.messages if m.role == "user")


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("row", [{"messages": exchange("q", "a")}, {"prompt": "q", "completion": "a"}])
def test_a_system_column_is_a_system_turn(tmp_path: Path, column: str, row: dict[str, Any]) -> None:
    (record,) = read_documents(write_rows(tmp_path / "d.jsonl", [{**row, column: "Be brief."}]))
    assert isinstance(record, Conversation)
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", "Be brief."),
        ("user", "q"),
        ("assistant", "a"),
    ]
    row_with_both = {
        "messages": [{"role": "system", "content": "Be brief."}, *exchange("q", "a")],
        column: "Be brief.",
    }
    assert read_documents(write_rows(tmp_path / "e.jsonl", [row_with_both]))[0].messages == record.messages  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "trained"),
    [
        ({}, True),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"training": False}, False),
        ({"weight": 0}, False),
        ({"weight": 1}, True),
        ({"weight": None}, True),
        ({"weight": 0.0, "train": False}, False),
    ],
)
def test_a_turn_says_whether_it_is_trained_on(tmp_path: Path, said: dict[str, Any], trained: bool) -> None:
    user, answer = exchange("q", "a")
    (record,) = read_documents(
        write_rows(tmp_path / "d.jsonl", [{"messages": [user, {**answer, **said}, *exchange("q2", "a2")]}])
    )
    assert isinstance(record, Conversation)
    assert [m.trained for m in record.messages] == [True, trained, True, True]


USER, ANSWER = exchange("q", "a")
UNKEPT: list[tuple[dict[str, Any], str]] = [
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": "1"}]}]}, r"messages\[1\]\.tool_calls\[0\]"),
    ({"messages": [USER, {**ANSWER, "function_call": {"name": 3}}]}, r"messages\[1\]\.function_call"),
    ({"messages": [USER, ANSWER, {"role": "tool", "content": "4"}]}, r"messages\[2\]\.role"),
    ({"messages": [{**USER, "images": ["a.png"]}, ANSWER]}, r"messages\[0\]\.images"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, r"messages\[1\]\.weight"),
    ({"messages": [USER, {**ANSWER, "weight": "1"}]}, r"messages\[1\]\.weight"),
    ({"messages": [USER, {**ANSWER, "train": True, "weight": 0}]}, r"messages\[1\]"),
    ({"messages": [{**USER, "train": True}, ANSWER]}, r"messages\[0\]\.train"),
    ({"messages": [USER, {**ANSWER, "content": None}]}, r"messages\[1\]\.content"),
    ({"messages": [USER, {**ANSWER, "content": ""}]}, r"messages\[1\]\.content"),
    ({"messages": [USER, {**ANSWER, "content": " \n"}]}, r"messages\[1\]\.content"),
    ({"messages": [{**USER, "content": ""}, ANSWER]}, r"messages\[0\]\.content"),
    ({"messages": [{"role": "system", "content": "A."}, USER, ANSWER], "system": "B."}, "system"),
    ({"prompt": "q", "completion": "a", "system": 3}, "system"),
    ({"prompt": "q", "completion": "a", "response": "b"}, "prompt"),
    ({"prompt": "", "completion": "a"}, "prompt"),
    ({"messages": [USER, ANSWER], "tools": [{"title": "f"}]}, r"tools\[0\]"),
    ({"messages": [USER, ANSWER], "images": ["a.png"]}, "images"),
    ({"messages": [USER, ANSWER], "weight": 0.5}, "weight"),
    ({"messages": [USER, ANSWER], "train": False}, "train"),
    ({"messages": [USER, ANSWER], "weight": "0.5"}, "weight"),
    ({"messages": [USER, ANSWER], "tools": '[{"name": "f"'}, "tools"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"text": "t", "system": "s"}, "system"),
]


@pytest.mark.parametrize(("row", "field"), UNKEPT, ids=[str(i) for i in range(len(UNKEPT))])
def test_what_cannot_be_kept_is_refused_by_name(tmp_path: Path, row: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        read_documents(write_rows(tmp_path / "d.jsonl", [row]))
    assert re.fullmatch(rf".*d\.jsonl, row 1, {field}", caught.value.field)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {**ANSWER, "tool_calls": []}], "tools": None, "images": []},
        {"messages": [USER, {**ANSWER, "name": "Ann", "refusal": None}], "weight": 1, "score": 3},
        {"messages": [USER, {**ANSWER, "content": "", "train": False}, *exchange("q2", "a2")]},
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER], "text": "<s>rendered</s>"},
        {"prompt": "q", "completion": None},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": [USER, ANSWER], "system": ""},
        {"messages": [USER, ANSWER], "tools": "[]", "train": "split a"},
    ],
)
def test_what_says_nothing_is_no_obstacle(tmp_path: Path, row: dict[str, Any]) -> None:
    (record,) = read_documents(write_rows(tmp_path / "d.jsonl", [row]))
    assert isinstance(record, Conversation)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"PAR1\x15\x04", "cut or damaged"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x1f\x8b\x08", "cannot be unpacked"),
        (b"(\xb5/\xfd\x04", "cannot be unpacked"),
        (b"BZh9", "cannot be unpacked"),
        (b"\xfd7zXZ\0", "cannot be unpacked"),
        (b"\xff\xfea\0", "text in UTF-16"),
        (b"ARROW1\0\0", "cut or damaged"),
        (b"\xff\xff\xff\xff\x10", "cut or damaged"),
        (b'[\n{"text": "a"},', "was cut"),
    ],
)
def test_another_kind_of_file_is_called_by_its_name(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        read_documents(path)
    assert str(caught.value).isprintable()


LIMITED = """
import resource, sys
from pathlib import Path
from align.data.read.records import read_documents
from align.core.errors import InputError
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    read_documents(Path(sys.argv[1]))
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_of_100_mb_is_refused_within_a_gigabyte(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    with (gzip.open if packed else open)(path, "wb", **({"compresslevel": 1} if packed else {})) as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"words and " * 104_858)
        file.write(b'"}\n')
    process = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=False)
    assert "row 2=" in process.stdout, process.stderr
    assert "a line of more than 32 MiB" in process.stdout
