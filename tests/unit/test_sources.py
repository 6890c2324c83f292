"""Rows of a file as conversations, prompts and texts, and the split into training and held-out rows."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from json_lines import write_rows

from align.core.errors import CorruptFile, InputError
from align.core.types import Conversation
from align.data.read.records import read_documents
from align.data.sources import DataSource, build_data_input, read_documents_of_split, read_source_prompts
from align.data.split import truncate_to_question


def build_message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def jsonl(path: Path, held_out: float = 0.25, **more: Any) -> DataSource:
    return DataSource(name="jsonl", path=str(path), held_out=held_out, **more)


def list_turns(document: Any) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in document.messages]


ASKED = ("user", "Hi?")
ANSWERED = ("assistant", "Hello.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [build_message(*ASKED), build_message(*ANSWERED)]}, [ASKED, ANSWERED]),
        ({"messages": [build_message("system", "Be brief."), build_message(*ASKED)]}, [("system", "Be brief."), ASKED]),
        ({"prompt": "Hi?", "completion": "Hello."}, [ASKED, ANSWERED]),
        ({"prompt": [build_message(*ASKED)], "completion": [build_message(*ANSWERED)]}, [ASKED, ANSWERED]),
        ({"prompt": "Hi?", "response": "Hello.", "score": 3}, [ASKED, ANSWERED]),
        ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}, [ASKED, ANSWERED]),
        (
            {"prompt": "Hi?", "chosen": [build_message(*ASKED), build_message(*ANSWERED)], "rejected": []},
            [ASKED, ANSWERED],
        ),
        ({"prompt": "Hi?"}, [ASKED]),
        ({"prompt": "Hi?", "completion": None}, [ASKED]),
    ],
)
def test_rows_become_conversations(tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    (document,) = read_documents(write_rows(tmp_path / "d.jsonl", [row]))
    assert list_turns(document) == expected
    assert isinstance(document, Conversation)
    assert document.id == "d.jsonl:1"


def test_gz_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"text": "é"}\n\n  \n{"text": "b"}'.encode()))
    assert read_documents(path) == ["é", "b"]


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "d.jsonl", [{"text": "a"}])
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataSource(name="jsonl", path="~/d.jsonl", held_out=0.0)
    assert read_documents_of_split(data, "train") == ["a"]
    assert len(build_data_input(data).digest) == 64


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("content", "row", "problem"),
    [
        (GOOD * 2 + b'{"text": \n', 3, "not a line of JSON"),
        (GOOD * 2 + b'{"text": "\xe9"}\n', 3, "not a line of JSON in UTF-8"),
        (GOOD + b"[1, 2]\n", 2, "a list, not an object"),
        (GOOD + b'"words"\n', 2, "a str, not an object"),
        (GOOD + b'\n{"asked": "a", "said": "b"}\n', 3, "asked, said.*no row of a supported shape.*`messages`"),
        (GOOD + b"{}\n", 2, "no row of a supported shape"),
        (b'{"text": 3}\n', 1, "text=3: is no text"),
        (b'{"messages": []}\n', 1, r"messages=\[\]: is no list of messages"),
        (b'{"messages": null}\n', 1, "messages=None: is no list of messages"),
        (b'{"messages": ["Hi"]}\n', 1, r"messages\[0\]=Hi: is no message"),
        (b'{"messages": [{"role": "user"}]}\n', 1, r"messages\[0\]\.content=None: is missing"),
        (b'{"messages": [{"role": "bot", "content": "a"}]}\n', 1, r"messages\[0\]\.role=bot: is none of"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}\n', 1, r"content\[0\]=a: is a list of parts"),
        (b'{"prompt": 3}\n', 1, "prompt=3: is a number, but a text is expected"),
        (b'{"prompt": null, "completion": "a"}\n', 1, "prompt=None: asks nothing"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(tmp_path: Path, content: bytes, row: int, problem: str) -> None:
    path = tmp_path / "bad (é).jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        read_documents(path)
    assert caught.value.field.startswith(f"{path}, row {row}")
    assert caught.value.exit_status == 2


def test_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path=.*absent\.jsonl"):
        read_documents(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match=r"data\.path=.*no such file"):
        build_data_input(jsonl(tmp_path / "absent.jsonl"))
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(InputError, match=r"data\.path=.*is empty"):
        read_documents(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD * 5000)[:-20])
    with pytest.raises(CorruptFile, match=r"cut\.jsonl\.gz"):
        read_documents(tmp_path / "cut.jsonl.gz")
    (tmp_path / "not.jsonl.gz").write_bytes(GOOD)
    with pytest.raises(CorruptFile, match=r"not\.jsonl\.gz"):
        read_documents(tmp_path / "not.jsonl.gz")


# The split.


def build_numbered_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(count)]


def collect_questions(documents: list[Any]) -> set[str]:
    return {c.messages[0].content for c in documents}


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    data = jsonl(write_rows(tmp_path / "d.jsonl", build_numbered_rows(400)))
    train = read_documents_of_split(data, "train")
    test = read_documents_of_split(data, "test")
    assert len(train) + len(test) == 400
    assert not collect_questions(train) & collect_questions(test)
    assert 60 < len(test) < 140
    assert collect_questions(read_source_prompts(data, "train")) == collect_questions(train)
    assert collect_questions(read_source_prompts(data, "test")) == collect_questions(test)


def test_the_division_follows_the_question_and_not_the_place(tmp_path: Path) -> None:
    first = jsonl(write_rows(tmp_path / "a.jsonl", build_numbered_rows(60)))
    reanswered = [{"prompt": r["prompt"], "completion": "Another."} for r in build_numbered_rows(60)]
    second = jsonl(
        write_rows(tmp_path / "b.jsonl", [*build_numbered_rows(90)[60:], *reanswered[::-1], *build_numbered_rows(60)])
    )
    held_out = collect_questions(read_documents_of_split(first, "test"))
    assert 0 < len(held_out) < 60
    assert held_out == collect_questions(read_documents_of_split(second, "test")) & collect_questions(
        read_documents_of_split(first, "test") + read_documents_of_split(first, "train")
    )
    assert not held_out & collect_questions(read_documents_of_split(second, "train"))


def test_nothing_for_one_side_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", build_numbered_rows(4))
    data = jsonl(path, held_out=1.0)
    with pytest.raises(InputError, match=r"no row to train on.*data\.held_out"):
        read_documents_of_split(data, "train")
    with pytest.raises(InputError, match=r"no question to train on.*data\.held_out"):
        read_source_prompts(data, "train")
    with pytest.raises(InputError, match=r"no question to measure on.*data\.eval_path"):
        read_source_prompts(jsonl(path, held_out=0.0), "test")
    plain = jsonl(write_rows(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}]), held_out=0.0)
    with pytest.raises(InputError, match="no question to train on"):
        read_source_prompts(plain, "train")


def test_order_follows_the_seed_and_limit_cuts_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", build_numbered_rows(40))
    data = jsonl(path)
    assert (
        read_documents_of_split(data, "train", 1)
        == read_documents_of_split(data, "train", 1)
        != read_documents_of_split(data, "train", 2)
    )
    assert read_documents_of_split(jsonl(path, limit=5), "train", 1) == read_documents_of_split(data, "train", 1)[:5]


def test_a_question_ends_with_the_users_last_turn() -> None:
    asking = [
        build_message("system", "s"),
        build_message("user", "a"),
        build_message("assistant", "b"),
        build_message("user", "c"),
    ]
    for answer_turns in ([], [build_message("assistant", "d")]):
        question = truncate_to_question(Conversation.from_messages([*asking, *answer_turns], "id"))
        assert question is not None
        assert question.as_dicts() == asking
        assert question.id == "id"
    assert truncate_to_question(Conversation.from_messages([build_message("assistant", "b")])) is None
    assert truncate_to_question("text") is None
