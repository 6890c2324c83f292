"""Tests that each column of a row is read, written below the question, kept as metadata, or refused."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from record_reads import read_records
from row_formats import WRITERS, write_row_file
from test_read_records import SHAPES

from align.config.compose import build_config, compose_tree
from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Message, Preference, Record
from align.data.pairs import has_labels
from align.data.read.column_rules import CHOICE_COLUMNS, CONTEXT_COLUMNS, ColumnRules, iter_texts
from align.data.read.content import DOCUMENTS, FEEDBACK, extract_prompt, get_record_kind, iter_strings, list_texts
from align.data.read.drops import BadRows
from align.data.read.records import ParsedRecord, read_documents, read_feedback, read_preferences
from align.data.read.unread_columns import UnreadColumns
from align.data.sources import DataSource, read_source_prompts

LONG = "the notes say that the shop opens at nine and closes at six, but for Sundays"
SHORT = "shop notes"
NOTHING = ColumnRules()
U = Message("user", "q")
A = Message("assistant", "a")
B = Message("assistant", "b")
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
WORSE = [TURNS[0], {"role": "assistant", "content": "b"}]


def read_source(path: Path, rules: ColumnRules = NOTHING) -> list[ParsedRecord]:
    """Read records as `stage=data` does: a column is refused at the end of its source."""
    bad_rows = BadRows()
    unread = UnreadColumns(rules)
    records = list(read_records(str(path), rules=rules, bad_rows=bad_rows))
    bad_rows.report_refused_rows(path, len(records))
    for read in records:
        unread.add(read.sizes)
    unread.check("stage.sources.s", str(path))
    return records


def read_prompts(path: Path, rules: ColumnRules = NOTHING) -> list[Any]:
    data = DataSource("files", str(path), held_out=0.0, columns=rules.columns, metadata=tuple(rules.metadata))
    return read_source_prompts(data, "train")


def get_training_readers(kind: str) -> list[Callable[..., Any]]:
    """Return the functions that read rows of a kind for training."""
    if kind == DOCUMENTS:
        return [lambda path, rules: read_documents(path, rules=rules)]
    if kind == FEEDBACK:
        return [lambda path, rules: read_feedback(str(path), "data.path", False, rules)]
    return [lambda path, rules: read_preferences(path, rules=rules)]


def extract_question(record: Record) -> str:
    """Return the text of the user turns before the answer."""
    prompt = extract_prompt(record)
    assert isinstance(prompt, Conversation)
    return "\n".join(turn.content for turn in prompt.messages if turn.role == "user")


def add_column(shape: str, column: str, value: Any) -> list[dict[str, Any]]:
    return [{**row, column: value} for row in SHAPES[shape][0]]


ASKING = [name for name in SHAPES if name not in ("text", "a flat tree", "a tree", "HelpSteer3", "Alpaca with history")]
"""Shapes whose question is one user turn."""
SAID = {**dict.fromkeys(CONTEXT_COLUMNS, LONG), **{name: ["red", "blue"] for name in CHOICE_COLUMNS}}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_column_that_changes_the_question_is_in_it_or_refused(shape: str, tmp_path: Path) -> None:
    for column, value in SAID.items():
        if any(column in row for row in SHAPES[shape][0]) and shape != "Alpaca":
            continue
        path = write_row_file(tmp_path, "d.jsonl", add_column(shape, column, value))
        parts = [value] if isinstance(value, str) else ["A. red", "B. blue"]
        if shape == "HH" or (shape not in ASKING and shape not in ("HelpSteer3", "Alpaca with history")):
            for read in (read_source, *get_training_readers(get_kind(shape))):
                with pytest.raises(InputError, match=rf"{column}=.*metadata") as caught:
                    read(path, NOTHING)
                assert column in caught.value.remedy
            continue
        expected = [read.record for read in read_source(path)]
        for record in expected:
            question = extract_question(record)
            assert all(question.count(part) == 1 for part in parts), (column, question)
            assert not any(part in text for text in list_texts(record)[1:] for part in parts if text not in question)
        for read in get_training_readers(get_kind(shape)):
            assert [*map(list_texts, read(path, NOTHING))] == [*map(list_texts, expected)]


def get_kind(shape: str) -> str:
    (_, [first, *_]) = SHAPES[shape]
    return FEEDBACK if "label" in first else "preferences" if "rejected" in first else DOCUMENTS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [LONG, [LONG], {"a": {"b": LONG}}])
def test_a_long_text_that_nothing_reads_is_refused_once_with_the_setting_to_copy(
    shape: str, value: Any, tmp_path: Path
) -> None:
    path = write_row_file(tmp_path, "d.jsonl", add_column(shape, "notes", value))
    with pytest.raises(InputError, match=r"column 'notes' holds text \(76 characters") as caught:
        read_source(path, ColumnRules(source=True))
    assert "metadata: [notes]" in caught.value.remedy
    assert "columns: {context: notes}" in caught.value.remedy
    for read in get_training_readers(get_kind(shape)):
        with pytest.raises(InputError, match="column 'notes' holds text") as caught:
            read(path, NOTHING)
        assert '"data.metadata=[notes]"' in caught.value.remedy
        assert '"data.columns={context: notes}"' in caught.value.remedy
        records = read(path, ColumnRules(metadata=["Notes"]))
        assert [*map(list_texts, records)] == [
            *map(list_texts, read(write_row_file(tmp_path, "lines.json", SHAPES[shape][0]), NOTHING))
        ]
    assert all(
        LONG in [*iter_strings(parsed.metadata)] for parsed in read_source(path, ColumnRules(metadata=["notes"]))
    )


@pytest.mark.parametrize("shape", ASKING)
def test_a_column_that_is_called_context_is_in_the_question(shape: str, tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", add_column(shape, "My Notes", LONG))
    rules = ColumnRules({"context": "my notes"})
    if shape == "HH":
        return
    assert all(extract_question(parsed.record).endswith(LONG) for parsed in read_source(path, rules))
    for read in get_training_readers(get_kind(shape)):
        assert all(extract_question(record).endswith(LONG) for record in read(path, rules))


@pytest.mark.parametrize("shape", SHAPES)
def test_other_columns_are_metadata_and_named_once(
    shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_columns = {
        "note": SHORT,
        "rating": 3,
        "tags": ["x", "y"],
        "nothing": None,
        "hash": "0f" * 40,
        "url": "http://" + "a" * 60,
    }
    path = write_row_file(tmp_path, "d.jsonl", [{**row, **new_columns} for row in SHAPES[shape][0]])
    filled_columns = {name: value for name, value in new_columns.items() if value is not None}
    for read in read_source(path):
        metadata = read.metadata.get("chosen", {}) if shape == "HelpSteer" else read.metadata
        assert filled_columns.items() <= metadata.items()
    capsys.readouterr()
    for read in get_training_readers(get_kind(shape)):
        read(path, NOTHING)
        assert capsys.readouterr().out.count("kept as metadata: ") == 1


def test_the_whole_column_decides_and_not_its_first_row(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": "a", "note": "x" if i < 99 else "a long note " * 800} for i in range(100)]
    with pytest.raises(InputError, match=r"column 'note' holds text \(97 characters"):
        read_documents(write_row_file(tmp_path, "d.jsonl", rows))
    rows[0]["note"] = rows[-1]["note"][:3000]
    rows[-1]["note"] = "x"
    assert len(read_documents(write_row_file(tmp_path, "d.jsonl", rows))) == 100


def test_a_column_that_repeats_the_row_is_metadata(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Then it is open."}]
    rendering = f"### Question:\n{LONG}\n\n### Answer:\nThen it is open."
    rows = [{"messages": turns, "prompt": LONG, "rendered": rendering, "context": LONG}]
    (read,) = read_source(write_row_file(tmp_path, "d.jsonl", rows))
    assert list_texts(read.record) == [LONG, "Then it is open."]
    assert read.metadata["prompt"] == LONG
    with pytest.raises(InputError, match="column 'rendered'"):
        read_source(write_row_file(tmp_path, "d.jsonl", [{**rows[0], "rendered": rendering + LONG.upper() * 3}]))


@pytest.mark.parametrize("prompt", [None, "q", [{"role": "user", "content": "q"}]])
def test_a_pair_of_whole_conversations_has_its_context_in_all_of_them(prompt: Any, tmp_path: Path) -> None:
    row = {"chosen": TURNS, "rejected": WORSE, "context": LONG}
    path = write_row_file(tmp_path, "d.jsonl", [row if prompt is None else {**row, "prompt": prompt}])
    (read,) = read_source(path)
    assert list_texts(read.record) == [f"q\n{LONG}", "a", "b"]
    assert [*map(list_texts, read_preferences(path))] == [list_texts(read.record)]
    if prompt is not None:
        assert [*map(list_texts, read_documents(path))] == [[f"q\n{LONG}", "a"]]


def test_the_worse_answer_of_a_pair_is_kept_where_the_better_one_is_imitated(tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{"prompt": "q", "chosen": "a", "rejected": LONG}])
    assert [*map(list_texts, read_documents(path, requires_answer=True))] == [["q", "a"]]


LETTERED = "\n".join(f"{letter.upper()}. {letter * 2}" for letter in "abcdefghij")


@pytest.mark.parametrize(
    ("columns", "below"),
    [
        ({"choices": ["x", "y"]}, "A. x\nB. y"),
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}}, "1. x\n2. y"),  # as ARC has them
        ({"options": {"A": "x", "B": "y"}}, "A. x\nB. y"),
        ({"options": [{"label": "a", "text": "x"}, {"label": "b", "text": "y"}]}, "a. x\nb. y"),
        ({"option_b": "y", "Option_A": "x"}, "A. x\nB. y"),
        ({"A": "x", "B": "y", "C": 3}, "A. x\nB. y\nC. 3"),
        ({"options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}]}, "A. x\nB. y"),
        ({"options": [{"id": "B", "content": "x"}, {"id": "A", "content": "y"}]}, "B. x\nA. y"),
        ({"options": [{"id": "0f" * 9, "option": "x"}, {"id": "f0" * 9, "option": 0}]}, "A. x\nB. 0"),
        ({"option_a": "x", "option_b": "", "option_c": "z", "option_d": None}, "A. x\nB.\nC. z"),
        ({"A": "x", "B": None, "C": "z", "D": ""}, "A. x\nB.\nC. z"),
        ({"option_a": 0, "option_b": 1, "option_c": False}, "A. 0\nB. 1\nC. false"),
        ({"choices": ["x", None, "z", None]}, "A. x\nB.\nC. z"),
        ({f"option_{letter}": letter * 2 for letter in "jihgfedcba"}, LETTERED),
        ({letter.upper(): letter * 2 for letter in "abcdefghij"}, LETTERED),
        ({f"option_{i}": f"o{i}" for i in range(1, 11)}, "\n".join(f"{i}. o{i}" for i in range(1, 11))),
        ({"documents": [{"text": "", "content": "one"}]}, "one"),
        ({"contexts": ["one", None, "two"]}, "one\n\ntwo"),
        ({"documents": [{"title": "T", "text": "one"}, "two"]}, "T\none\n\ntwo"),
        ({"choices": ["x"], "context": "c", "input": "i"}, "i\nc\nA. x"),
    ],
)
def test_the_rendering(columns: Mapping[str, Any], below: str, tmp_path: Path) -> None:
    (read,) = read_source(write_row_file(tmp_path, "d.jsonl", [{"prompt": "q", **columns, "completion": "it is x"}]))
    assert list_texts(read.record) == [f"q\n{below}", "it is x"]


@pytest.mark.parametrize(
    "row",
    [
        {"options": [{"key": "A", "sense": "x"}, {"key": "B", "sense": "y"}]},
        {"choices": {"label": ["A", "B"], "text": ["x"]}},
        {"choices": [{"label": "A", "text": ["x"]}]},
    ],
)
def test_choices_without_texts_or_with_fewer_are_refused(row: dict[str, Any], tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{"question": "q", **row, "answer": "A"}])
    (name,) = row
    with pytest.raises(InputError, match=f"{name}=.*neither a text nor a number"):
        read_source(path)
    (read,) = read_source(path, ColumnRules(metadata=[name]))
    assert read.metadata == row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "choices": [{"text": "a", "index": 0}]},
        {"messages": [{"role": "user", "content": "q"}], "choices": [{"message": {"content": "a"}}]},
        {"prompt": "q", "completion": "a", "choices": [{"text": "a", "finish_reason": "stop"}]},
    ],
)
def test_answers_that_an_api_logs_are_no_choices(row: dict[str, Any], tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [row])
    with pytest.raises(InputError, match=r"choices=.*in an API's log format"):
        read_source(path)
    (read,) = read_source(path, ColumnRules(metadata=["choices"]))
    assert read.metadata["choices"] == row["choices"]


def test_fields_of_choices_and_documents_that_are_not_written_are_metadata(tmp_path: Path) -> None:
    columns = {
        "options": [{"key": "A", "value": "x", "right": True}, {"key": "B", "value": "y", "right": False}],
        "documents": [{"text": "one", "score": 0.5, "summary": LONG}],
    }
    (read,) = read_source(write_row_file(tmp_path, "d.jsonl", [{"question": "q", **columns, "answer": "A"}]))
    assert list_texts(read.record) == ["q\none\nA. x\nB. y", "A"]
    assert read.metadata == columns


ANSWERED = {
    "pair": {"chosen": "a", "rejected": "b"},
    "completion": {"completion": "a"},
    "label": {"completion": "a", "label": True},
    "ranking": {"answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
    "scores": {"completions": [{"response": "a", "overall_score": 2}, {"response": "b", "overall_score": 1}]},
}
ASKED = [("prompt", "question"), ("prompt", "instruction"), ("prompt", "query"), ("prompt", "code")]


@pytest.mark.parametrize("answer", ANSWERED)
@pytest.mark.parametrize("asked", [*ASKED, ("instruction", "question"), ("question", "query")])
def test_a_second_question_is_refused_with_settings_that_work(
    answer: str, asked: tuple[str, str], tmp_path: Path
) -> None:
    row = {asked[0]: "Be brief.", asked[1]: "Is it open?", **ANSWERED[answer]}
    if asked[0] != "prompt" and answer in ("completion", "label", "ranking"):
        row = {**row, "response": row.pop("completion", "a")}
        row.pop("answers", "")
    path = write_row_file(tmp_path, "d.jsonl", [row])
    with pytest.raises(InputError) as caught:
        read_source(path)
    second = caught.value.problem.split("'")[1]
    assert caught.value.problem.startswith(f"column '{second}' holds text")
    assert f"{{context: {second}}}" in caught.value.remedy
    first = next(name for name in asked if name != second)
    for read in read_source(path, ColumnRules({"context": second})):
        assert extract_question(read.record) == f"{row[first]}\n{row[second]}"
    for read in read_source(path, ColumnRules(metadata=[second])):
        assert (extract_question(read.record), read.metadata[second]) == (row[first], row[second])
    rows_with_metadata = [
        {**{name: value for name, value in row.items() if name != second}, "metadata": {second: row[second]}}
    ]
    for read in read_source(write_row_file(tmp_path, "d.jsonl", rows_with_metadata)):
        assert read.metadata[second] == row[second]


@pytest.mark.parametrize(("first", "answer"), [("prompt", "completion"), ("instruction", "output")])
def test_the_answer_to_a_second_question_is_refused_with_settings_that_work(
    first: str, answer: str, tmp_path: Path
) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{first: "Be brief.", "question": "Is it open?", "answer": "No."}])
    for read in (read_source, read_documents):
        with pytest.raises(InputError) as caught:
            read(path)
        assert f'"data.columns={{{answer}: answer}}"' in caught.value.remedy
        with pytest.raises(InputError, match="column 'question'") as caught:
            read(path, rules=ColumnRules({answer: "answer"}))
        assert f'"data.columns={{{answer}: answer, context: question}}"' in caught.value.remedy
    (read,) = read_source(path, ColumnRules({answer: "answer", "context": "question"}))
    assert list_texts(read.record) == ["Be brief.\nIs it open?", "No."]


@pytest.mark.parametrize("answer", ANSWERED)
@pytest.mark.parametrize("column", ["prompt", "instruction", "question"])
def test_history_is_in_front_of_the_question(answer: str, column: str, tmp_path: Path) -> None:
    if column != "prompt" and answer in ("completion", "label", "ranking"):
        return
    row = {column: "And him?", "history": [["Who is she?", "Anna, the sister of the man."]], **ANSWERED[answer]}
    records = read_source(write_row_file(tmp_path, "d.jsonl", [row]))
    assert [list_texts(read.record)[:3] for read in records] == [
        ["Who is she?", "Anna, the sister of the man.", "And him?"]
    ]
    assert "history" not in records[0].metadata


@pytest.mark.parametrize("history", [5, "q", ["q"], [["q"]], {"q": "a"}])
@pytest.mark.parametrize("row", [{"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}])
def test_a_history_of_no_turns_is_refused(row: dict[str, Any], history: Any, tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{**row, "history": history}])
    for read in (read_source, read_documents):
        with pytest.raises(InputError, match="history"):
            read(path)
    turns = {"messages": TURNS, "history": [["q", "a"]]}
    with pytest.raises(InputError, match=r"history=.*needs a question that is one text"):
        read_source(write_row_file(tmp_path, "d.jsonl", [turns]))


def test_a_column_that_is_called_context_does_not_push_another_out(tmp_path: Path) -> None:
    row = {"question": "q", "context": "the passage", "notes": LONG, "answer": "a"}
    path = write_row_file(tmp_path, "d.jsonl", [row])
    assert extract_question(read_source(path, ColumnRules({"context": "notes"}))[0].record) == f"q\nthe passage\n{LONG}"
    rows = [{**shape_row, "notes": LONG} for shape_row in SHAPES["HelpSteer3"][0]]
    (read,) = read_source(write_row_file(tmp_path, "d.jsonl", rows), ColumnRules({"context": "notes"}))
    assert extract_question(read.record).endswith(f"\n{LONG}")


@pytest.mark.parametrize("answer", ["completion", "response", "output", "answer"])
@pytest.mark.parametrize(
    "turns", [{"messages": TURNS[:1]}, {"conversations": [{"from": "human", "value": "q"}]}], ids=["messages", "turns"]
)
def test_an_answer_beside_a_conversation_is_read(answer: str, turns: dict[str, Any], tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{**turns, answer: "a"}])
    (read,) = read_source(path)
    assert (list_texts(read.record), read.metadata) == (["q", "a"], {})
    assert [*map(list_texts, read_documents(path, requires_answer=True))] == [["q", "a"]]
    (prompt,) = read_prompts(path)
    assert (list_texts(prompt), json.loads(prompt.row)) == (["q"], {answer: "a"})
    path = write_row_file(tmp_path, "d.jsonl", [{**turns, answer: "a", "label": False}])
    (read,) = read_source(path)
    assert read.record == Feedback((U,), (A,), False, read.record.id)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="several answers"):
        read_source(write_row_file(tmp_path, "d.jsonl", [{**turns, "completion": "a", "response": "b", answer: "c"}]))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"text": "q", "answer": "a"}, "answer"),
        ({"question": "q", "answerKey": "A"}, "answerKey"),
        ({"question": "q", "best_answer": "A"}, "best_answer"),
        ({"question": "q", "answers": {"spans": ["a"], "starts": [1]}}, "answers"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "quality_a": 1}, "response_a"),
        ({"prompt": "q", "response_0": "a", "response_1": "b"}, "response_0"),
    ],
)
def test_a_row_without_an_answer_has_none_in_another_column(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [row])
    for read in (read_source, read_documents):
        with pytest.raises(InputError, match=f"{name}=.* has the name of an answer") as caught:
            read(path)
    assert re.search(rf"data\.metadata=\[{name}[],]", caught.value.remedy)
    if "text" not in row:
        (prompt,) = read_prompts(path)
        assert list_texts(prompt) == ["q"]
    other_columns = [column for column in row if column not in ("prompt", "question", "text", "messages")]
    assert read_source(path, ColumnRules(metadata=other_columns))[0].metadata == {
        column: row[column] for column in other_columns
    }
    if isinstance(row[name], str) and not name.startswith("response"):
        columns = {"question": "text", "answer": name} if "text" in row else {"answer": name}
        assert "data.columns={" + ", ".join(f"{a}: {b}" for a, b in columns.items()) + "}" in caught.value.remedy
        assert list_texts(read_source(path, ColumnRules(columns))[0].record) == ["q", row[name]]


@pytest.mark.parametrize("name", ["Notes, internal", "a: b", "my notes", "it's", "a]", "ä", "\\"])
def test_remedies_can_be_copied_whatever_a_column_is_called(name: str, tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{"question": "q", "context": "c", name: LONG, "answer": "a"}])
    with pytest.raises(InputError) as caught:
        read_documents(path)
    offered = re.findall('"(data.*?)"[. ]', f"{caught.value.remedy} ")
    assert len(offered) == 2
    texts = []
    for setting in offered:
        data = build_config(
            compose_tree(["stage=sft", "model=pocket", "data=files", f"data.path={path}", setting])
        ).data
        texts += map(list_texts, read_documents(path, rules=ColumnRules(data.columns or {}, data.metadata or ())))
    assert texts == [[f"q\nc\n{LONG}", "a"], ["q\nc", "a"]]


@pytest.mark.parametrize("name", ["explanation", "Rationale", "solution"])
def test_what_gives_the_answer_away_is_not_offered_as_part_of_the_question(name: str, tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{"question": "q", "answer": "a", name: LONG}])
    with pytest.raises(InputError) as caught:
        read_source(path)
    assert "context" not in caught.value.remedy
    assert f'"data.metadata=[{name}]"' in caught.value.remedy
    path = write_row_file(tmp_path, "d.jsonl", [{"question": "q", "answer": "a", name: LONG, "notes": LONG}])
    with pytest.raises(InputError, match=r"\{context: notes\}"):
        read_source(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_that_name_no_column_are_refused(shape: str, tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", add_column(shape, "note", SHORT))
    for read in (read_source, *get_training_readers(get_kind(shape))):
        with pytest.raises(InputError, match=r"columns=.*note.*: there is no column nope"):
            read(path, ColumnRules(metadata=["note", "nope"]))
        with pytest.raises(InputError, match=r"columns=.*note.*: note cannot be renamed to nonsense"):
            read(path, ColumnRules({"nonsense": "note"}))
    sparse = write_row_file(tmp_path, "lines.json", add_column(shape, "note", None))
    for read in (read_source, *get_training_readers(get_kind(shape))):
        assert read(sparse, ColumnRules(metadata=["note"]))


FEEDBACK_OF_MESSAGES = {
    "prompt": [{"role": "user", "content": "q"}],
    "completion": [{"role": "assistant", "content": "judged"}],
    "label": True,
}
words = st.sampled_from(["red", "a lamp", "is it open", "forty-two", LONG, "Z " * 30, "ß", "1"])
values = words | st.integers() | st.booleans() | st.none() | st.lists(words, max_size=3)
names = st.sampled_from(
    [
        *CONTEXT_COLUMNS,
        *CHOICE_COLUMNS,
        "prompt",
        "question",
        "instruction",
        "query",
        "messages",
        "completion",
        "response",
        "answer",
        "output",
        "chosen",
        "rejected",
        "label",
        "text",
        "history",
        "notes",
        "n",
        "option_a",
        "option_b",
        "Prompt",
        "Answer",
        "answers",
        "completions",
        "response1",
        "response2",
        "overall_preference",
        "helpfulness",
        "system",
        "score",
        "metadata",
    ]
)
BASES = [rows[0] for name, (rows, _) in SHAPES.items() if len(rows) == 1 and name not in ("HH", "a tree")]
drawn_rows = st.builds(
    lambda base, more: {**more, **base} if len(more) % 2 else {**base, **more},
    st.sampled_from(BASES),
    st.dictionaries(names, values, max_size=4),
)
LIMITS = settings(max_examples=250)


@LIMITS
@given(drawn_rows, st.sampled_from([{}, {"prompt": "notes"}, {"context": "n"}, {"completion": "notes"}]))
@example({**FEEDBACK_OF_MESSAGES, "answer": []}, {})  # the list was taken for the judged answer
@example({**FEEDBACK_OF_MESSAGES, "answer": ["gold"]}, {})
def test_every_text_of_any_row_is_read_or_kept_or_the_row_is_refused(row: Any, columns: dict[str, str]) -> None:
    columns = {ours: theirs for ours, theirs in columns.items() if theirs in row}
    path = Path(tempfile.mkdtemp()) / "d.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    refusal: InputError | None = None
    records = list[ParsedRecord]()
    try:
        records = read_source(path, ColumnRules(columns))
    except InputError as error:
        refusal = error
    if refusal is not None:
        assert all((refusal.field, refusal.problem, refusal.remedy))
    for name, value in row.items():
        if not records or (name == "label" and isinstance(records[0].record, Feedback)):
            continue
        if name == "winner" and isinstance(records[0].record, Preference):
            continue
        record_text = " ".join(
            part for parsed in records for part in [*list_texts(parsed.record), *iter_strings(parsed.metadata)]
        )
        attributes = [
            value for parsed in records if isinstance(parsed.record, Preference) for value in astuple(parsed.record)
        ]
        for text in iter_texts(value):
            assert text in record_text or text in attributes, (name, row, records)
        if type(value) is int and name not in FIGURES:
            assert str(value) in record_text or value in [*records[0].metadata.values(), *attributes], (
                name,
                row,
                records,
            )


FIGURES = {"overall_preference", "helpfulness", "score", *SAID, "option_a", "option_b"}


# --- Choices that the question names itself.

NAMED = "Which fits?\nA) E14\nB) E27"


@pytest.mark.parametrize(
    ("question", "answer", "below"),
    [
        (NAMED, "B", ""),
        (NAMED, "(b)", ""),
        (NAMED, "E27", ""),
        ("Which fits? 1. E14 2. E27", "2", ""),
        ("Which fits? 1. E14 2. E27", "B", "\nA. E14\nB. E27"),
        ("Is it E14 or E27?", "E27", ""),
        ("Is it E14 or E27?", "B", "\nA. E14\nB. E27"),
        ("Which fits?", "b.", "\nA. E14\nB. E27"),
    ],
)
def test_the_label_of_an_answer_means_one_choice(question: str, answer: str, below: str, tmp_path: Path) -> None:
    for row in (
        {"question": question, "answer": answer},
        {"prompt": question, "completion": answer},
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
    ):
        (read,) = read_source(write_row_file(tmp_path, "d.jsonl", [{**row, "choices": ["E14", "E27"]}]))
        assert list_texts(read.record) == [question + below, answer]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "Which fits?\nA) E27\nB) E14", "choices": ["E14", "E27"], "answer": "B"}, "several choices"),
        ({"question": "Which fits?", "choices": ["E14", "E27"], "answer": "C"}, "not the label of a choice"),
        ({"question": "Which fits?", "choices": ["E14", "E27"], "answer": "1"}, "not the label of a choice"),
        ({"question": "How many?", "option_1": "2", "option_2": "3", "answer": "2"}, "several choices"),
    ],
)
def test_a_label_that_means_no_choice_or_two_is_refused(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    assert copy_remedies(tmp_path, row, f"{problem}.*Write the text of the choice") == 1


# --- Fields of turns.


def test_fields_of_turns_are_metadata_and_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{**TURNS[0], "mood": "calm", "name": "Anna"}, {**TURNS[1], "n": 0, "note": LONG, "refusal": None}]
    fields = {"mood": ["calm", None], "name": ["Anna", None], "n": [None, 0], "note": [None, LONG]}
    pair = {"prompt": turns[:1], "chosen": turns[1], "rejected": WORSE[1]}
    rows = {
        "messages": {"messages": turns},
        "conversations": {
            "conversations": [{**turn, "from": turn["role"], "value": turn["content"]} for turn in turns]
        },
        "prompt": pair,
    }
    for column, row in rows.items():
        path = write_row_file(tmp_path, "d.jsonl", [row, row])
        for read in read_source(path):
            assert list_texts(read.record)[:2] == ["q", "a"]
            expected = {f"{column}[].{name}": values for name, values in fields.items()}
            if row is pair:
                expected = {
                    "prompt[].mood": ["calm"],
                    "prompt[].name": ["Anna"],
                    "chosen[].n": [0],
                    "chosen[].note": [LONG],
                }
            assert read.metadata == expected
        capsys.readouterr()
        get_training_readers("preferences" if row is pair else DOCUMENTS)[0](path, NOTHING)
        assert capsys.readouterr().out.count(".mood") == 1


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "human", "value": "q", "content": "another"},
        {"from": "human", "value": "q", "role": "assistant"},
        {"role": "user", "content": "q", "value": "another"},
        {"role": "user", "content": "q", "text": "another"},
        *({"role": "user", "content": "q", name: ["x"]} for name in ("attachments", "images", "image_url", "files")),
        {"role": "user", "content": "q", "context": LONG},
    ],
)
def test_a_field_that_changes_its_turn_is_refused(turn: dict[str, Any], tmp_path: Path) -> None:
    column = "conversations" if "from" in turn else "messages"
    answer = {"from": "gpt", "value": "a"} if "from" in turn else TURNS[1]
    name = {"conversations": "role|value", "messages": [*turn][-1]}[column]
    for read in (read_source, read_documents):
        with pytest.raises(InputError, match=rf"{column}\[0\]\.({name})"):
            read(write_row_file(tmp_path, "d.jsonl", [{column: [turn, answer]}]))
    same = {**turn, **{key: "q" for key in ("content", "value", "text") if key in turn}}
    same |= {key: [] for key in ("attachments", "images", "image_url", "files", "context") if key in turn}
    if "role" in turn and "from" in turn:
        same["role"] = "user"
    assert list_texts(read_source(write_row_file(tmp_path, "d.jsonl", [{column: [same, answer]}]))[0].record) == [
        "q",
        "a",
    ]


# --- Several answers, and two answers with a verdict.


@pytest.mark.parametrize(
    "question", [{"question": "q"}, {"query": "q"}, {"prompt": "q"}, {"instruction": "q"}, {"messages": TURNS[:1]}]
)
@pytest.mark.parametrize(
    "answers",
    [
        {"answers": {"text": ["a", "b"], "answer_start": [3, 9]}},  # SQuAD
        {"answers": [{"text": "a", "answer_start": 3}, {"text": "b", "answer_start": 9}]},
        {"answer": {"value": "a", "aliases": ["b"], "normalized_value": "a", "type": "WikipediaEntity"}},  # TriviaQA
        {"answer": ["a", "b"]},  # Natural Questions
        {"answers": ["a", LONG]},
    ],
)
def test_the_first_of_several_answers_is_imitated(
    question: dict[str, Any], answers: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{**question, **answers, "context": LONG, "id": "1"}]
    for name in ("d.jsonl", "d.parquet"):
        path = write_row_file(tmp_path, name, rows)
        (read,) = read_source(path)
        assert list_texts(read.record) == [f"q\n{LONG}", "a"]
        assert read.metadata == {**answers, "id": "1"}
        assert [*map(list_texts, read_documents(path, requires_answer=True))] == [[f"q\n{LONG}", "a"]]
        (prompt,) = read_prompts(path)
        assert {**answers, "id": "1"}.items() <= json.loads(prompt.row).items()
    empty_answers = {name: {"text": [], "answer_start": []} for name in answers}
    with pytest.raises(InputError, match="the assistant's turn is empty"):
        read_source(write_row_file(tmp_path, "d.jsonl", [{**question, **empty_answers}]))


@pytest.mark.parametrize(
    "row",
    [
        {"answers": ["bad", "good"], "scores": [0.1, 0.9]},
        {"answers": ["good", "bad"], "rank": [2, 1]},
        {
            "answers": [
                {"text": "bad", "pm_score": 1, "selected": False},
                {"text": "good", "pm_score": 9, "selected": True},
            ]
        },
    ],
)
def test_answers_with_scores_of_their_own_are_not_read_as_the_first(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="answers"):
        read_source(write_row_file(tmp_path, "d.jsonl", [{"question": "q", **row}]))


@pytest.mark.parametrize(
    ("answers", "column"),
    [
        ({"answerA": "x", "answerB": "y", "answerC": "z"}, "label"),  # SocialIQA
        ({"answer_a": "x", "answer_b": "y", "answer_c": "z", "answer_d": "w"}, "label"),
        ({"orig_response_A": "x", "orig_response_B": "y"}, "orig_preference"),  # Prometheus
    ],
)
def test_more_than_two_answers_are_no_pair(answers: dict[str, str], column: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_preferences(write_row_file(tmp_path, "d.jsonl", [{"prompt": "q", **answers, column: "A"}]))


@pytest.mark.parametrize("code", [0, -1, "0", 0.0])
def test_a_code_below_one_refuses_its_source_whole(code: Any, tmp_path: Path) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y"}
    path = write_row_file(tmp_path, "d.jsonl", [{**row, "preference": 1}, {**row, "preference": code}])
    with pytest.raises(InputError, match="may mean the first answer, a tie or a degree") as refused:
        read_preferences(path, skip_bad_rows=True)
    assert "on_bad_row" not in refused.value.remedy


KAGGLE = {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (r'["\ud83d"]', "half a character"),
        (r'["\u0000"]', "NUL"),
        ('["a", "b"]', "another length"),
    ],
)
def test_texts_in_lists_of_the_arena_are_checked(response: str, problem: str, tmp_path: Path) -> None:
    row = {"prompt": '["q"]', "response_a": response, "response_b": '["y"]', **KAGGLE}
    with pytest.raises(InputError, match=problem):
        read_preferences(write_row_file(tmp_path, "d.jsonl", [row]))


def test_lists_beside_another_verdict_stay_texts(tmp_path: Path) -> None:
    row = {"prompt": '["q"]', "response_a": '["x"]', "response_b": '["y"]', "winner": "a"}
    (pair,) = read_preferences(write_row_file(tmp_path, "d.jsonl", [row]))
    assert [turn.content for turn in (*pair.prompt, *pair.chosen)] == ['["q"]', '["x"]']


VERDICTS = {
    ("a", "b"): (["a", "A", "model_a", "response_a", "[[A]]", 1, 1.0, "1"], ["b", "Model B", 2, "2"]),
    ("1", "2"): (["1", 1, "output_1", 1.0], [2, "2", "Response 2"]),
    ("0", "1"): ([0, "0", "response_0"], [1, "1"]),
}


@pytest.mark.parametrize("endings", VERDICTS)
@pytest.mark.parametrize("stem", ["response_", "answer_", "output_", "completion", "Response "])
@pytest.mark.parametrize("column", ["winner", "preference", "label", "better_response_id"])
def test_two_answers_and_a_verdict_are_a_pair(endings: tuple[str, str], stem: str, column: str, tmp_path: Path) -> None:
    row = {"prompt": "q", f"{stem}{endings[0]}": "x", f"{stem}{endings[1]}": "y", "model": "m"}
    for better, verdicts in zip(("x", "y"), VERDICTS[endings], strict=True):
        path = write_row_file(tmp_path, "d.jsonl", [{**row, column: verdict} for verdict in verdicts])
        pairs = [read.record for read in read_source(path)]
        assert [list_texts(pair) for pair in pairs] == [["q", better, "y" if better == "x" else "x"]] * len(verdicts)
        assert [*map(list_texts, read_preferences(path))] == [*map(list_texts, pairs)]
        assert read_source(path)[0].metadata == {"model": "m"}
    ties = [{**row, column: tie} for tie in ("tie", "tie (bothbad)", "both_bad", "Draw")]
    with pytest.raises(InputError, match="none of its 4 rows holds a preference"):
        read_preferences(write_row_file(tmp_path, "d.jsonl", ties))
    for value in ("c", 3, -1, True, "m", *([0] if endings != ("0", "1") else [2])):
        with pytest.raises(InputError, match=rf"{column}=.*(neither of the answers|may mean the first answer).*Write"):
            read_source(write_row_file(tmp_path, "d.jsonl", [{**row, column: value}]))


def test_models_are_named_as_winners(tmp_path: Path) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y", "model_a": "m1", "model_b": "m2", "winner": "m2"}
    (read,) = read_source(write_row_file(tmp_path, "d.jsonl", [row]))
    assert list_texts(read.record) == ["q", "y", "x"]
    assert read.metadata == {"model_a": "m1", "model_b": "m2"}


@pytest.mark.parametrize("winner", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_lists_of_turns_as_the_arena_on_kaggle_has_them(winner: tuple[int, int, int], tmp_path: Path) -> None:
    columns = {"prompt": ["q", "r"], "response_a": ["a", "c"], "response_b": ["b", None]}
    verdict = dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), winner, strict=True))
    for row in (columns, {name: json.dumps(value) for name, value in columns.items()}):
        for name in WRITERS:
            path = write_row_file(tmp_path, name, [{"id": 7, **row, **verdict}])
            if winner == (1, 1, 0):
                with pytest.raises(InputError, match="winner_model_a"):
                    read_source(path)
                continue
            texts = [list_texts(read.record) for read in read_source(path)]
            sides = [["a", "r", "c"], ["b", "r", ""]]
            expected = {(1, 0, 0): ["q", *sides[0], *sides[1]], (0, 1, 0): ["q", *sides[1], *sides[0]]}
            assert texts == ([expected[winner]] if winner in expected else [])


# --- Every setting that an error prints works when it is copied.


def copy_remedies(folder: Path, row: dict[str, Any], problem: str = "") -> int:
    """Read a refused row again with each setting that the error offers. Returns their number."""
    path = write_row_file(folder, "d.jsonl", [row])
    with pytest.raises(InputError, match=problem) as caught:
        read_source(path)
    offered = re.findall('"(data.*?)"[. ]', f"{caught.value.remedy} ")
    for setting in offered:
        data = build_config(
            compose_tree(["stage=sft", "model=pocket", "data=files", f"data.path={path}", setting])
        ).data
        read_source(path, ColumnRules(data.columns or {}, data.metadata or ()))
    return len(offered)


@pytest.mark.parametrize(
    "row",
    [
        *(
            {"question": "q", "answer": "a", "metadata": {name: LONG}}
            for name in ("context", "notes", "Notes, internal")
        ),
        {"question": "q", "answer": "a", "metadata": json.dumps({"context": LONG, "n": 1})},
        {"question": "q", "answer": "a", "metadata": {"context": LONG}, "context": "c"},
        {"question": "q", "answer": "a", "notes": LONG, "more": LONG},
        {"messages": [*TURNS, *TURNS], "context": LONG},
        {"question": "q", "answer": "a", "option_a": ["x"], "option_b": ["y"], "option_c": "z"},
        {"question": "q", "answer": "a", "context": {"x": [LONG]}},
        {"question": "q", "best_answer": "a"},
        {"prompt": "q", "instruction": "r", "completion": "a"},
        {"prompt": "q", "completion": "a", "label": "good"},
        {"prompt": "q", "response_a": "a", "response_b": "b"},
        {"text": "q", "label": 1},
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a", "notes": LONG},
        {"conversation_a": TURNS, "conversation_b": WORSE, "winner": "model_a", "notes": LONG},
        {"question": "q", "answers": {"text": ["a"]}, "notes": LONG},
    ],
)
def test_settings_that_an_error_offers_work(row: dict[str, Any], tmp_path: Path) -> None:
    assert copy_remedies(tmp_path, row) > 0


# --- Labels.


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        *((value, True) for value in (True, 1, 1.0, "1", "true", "True", "TRUE", "yes", "Yes", " yes ")),
        *((value, False) for value in (False, 0, 0.0, "0", "false", "False", "no", "NO")),
    ],
)
def test_labels(label: Any, wanted: bool, tmp_path: Path) -> None:
    for name in WRITERS:
        path = write_row_file(tmp_path, name, [{"prompt": "q", "completion": "a", "label": label}])
        assert [(row.record.label, get_record_kind(row.record)) for row in read_source(path)] == [(wanted, FEEDBACK)]  # type: ignore[union-attr]
        assert [feedback.label for feedback in read_feedback(str(path), "data.path", False)] == [wanted]
        assert has_labels(DataSource("files", str(path)))
        with pytest.raises(InputError, match="label="):
            read_documents(path, requires_answer=True)
        assert len(read_prompts(path)) == 1


@pytest.mark.parametrize("label", ["maybe", "2", 2, -1, 0.5, "positive", ["true"]])
@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": "a"}, {"text": "a"}, {"messages": SHAPES["messages"][1][0]["messages"]}]
)
def test_a_label_that_cannot_be_read_is_refused(row: dict[str, Any], label: Any, tmp_path: Path) -> None:
    path = write_row_file(tmp_path, "d.jsonl", [{**row, "label": label}])
    with pytest.raises(InputError, match=r"label=.*is no label"):
        read_source(path)
    with pytest.raises(InputError, match="label="):
        read_documents(path)
    (read,) = read_source(path, ColumnRules(metadata=["label"]))
    assert (get_record_kind(read.record), read.metadata) == (DOCUMENTS, {"label": label})


# --- Published data sets, as their columns are.

PUBLISHED: dict[str, tuple[list[dict[str, Any]], str, Any]] = {
    "UltraFeedback": (
        [
            {
                "source": "evol_instruct",
                "instruction": "q",
                "models": ["m1", "m2"],
                "correct_answers": ["None"],
                "incorrect_answers": [LONG],
                "completions": [
                    {
                        "model": m,
                        "principle": "helpfulness",
                        "custom_system_prompt": LONG,
                        "response": text,
                        "critique": LONG,
                        "overall_score": score,
                        "fine-grained_score": 4.0,
                        "annotations": {"honesty": {"Rating": "5"}},
                    }
                    for m, text, score in (("m1", "b", 3.0), ("m2", "a", 8.5))
                ],
            }
        ],
        "preferences",
        5.5,
    ),
    "HelpSteer2": (
        [
            {
                "prompt": "q",
                "response": text,
                "helpfulness": n,
                "correctness": 4,
                "coherence": 4,
                "complexity": 2,
                "verbosity": 1,
            }
            for text, n in (("a", 4), ("b", 3))
        ],
        "preferences",
        1,
    ),
    "HelpSteer2's preferences": (
        [
            {
                "split": "train",
                "prompt": "q",
                "response_1": "b",
                "response_2": "a",
                "preference_strength": 2,
                "preference_statement": LONG,
                "preference_elaboration": LONG,
                "three_most_similar_preferences": [{"statement": LONG, "strength": 2}],
                "all_preferences_unprocessed": [LONG],
            }
        ],
        "preferences",
        2,
    ),
    "HelpSteer3": (
        [
            {
                "domain": "general",
                "language": "english",
                "context": [TURNS[0]],
                "response1": "a",
                "response2": "b",
                "overall_preference": -3,
                "individual_preference": [{"score": -3, "reasoning": LONG, "feedback1": LONG}],
            }
        ],
        "preferences",
        3,
    ),
    "Tülu 3 SFT": ([{"id": "x_1", "messages": TURNS, "source": "ai2-adapt-dev/flan_v2_converted"}], DOCUMENTS, None),
    "Tülu 3 preferences": (
        [{"id": "x_1", "prompt": "q", "chosen": TURNS, "rejected": WORSE, "source": "ai2/a"}],
        "preferences",
        None,
    ),
    "UltraFeedback binarised": (
        [
            {
                "prompt": "q",
                "prompt_id": "0f" * 32,
                "chosen": TURNS,
                "rejected": WORSE,
                "messages": TURNS,
                "score_chosen": 8.0,
                "score_rejected": 6.0,
            }
        ],
        "preferences",
        2,
    ),
    "LLaMA-Factory, ShareGPT": (
        [
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            }
        ],
        "preferences",
        None,
    ),
    "LLaMA-Factory, Alpaca": ([{"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}], "preferences", None),
    "chosen_response": ([{"prompt": "q", "chosen_response": "a", "rejected_response": "b"}], "preferences", None),
    "OASST": (
        [
            {
                "message_id": name,
                "parent_id": parent,
                "user_id": "u",
                "created_date": "2023-02-05T14:23:50.983374+00:00",
                "text": text,
                "role": role,
                "lang": "en",
                "review_count": 3,
                "review_result": True,
                "deleted": False,
                "rank": None,
                "synthetic": False,
                "model_name": None,
                "detoxify": {"toxicity": 0.1},
                "message_tree_id": "t",
                "tree_state": "ready_for_export",
                "emojis": {"name": ["+1"], "count": [2]},
                "labels": {"name": ["spam"]},
            }
            for name, parent, role, text in (("1", None, "prompter", "q"), ("2", "1", "assistant", "a"))
        ],
        DOCUMENTS,
        None,
    ),
    "OASST trees": (
        [
            {
                "message_tree_id": "t",
                "tree_state": "ready_for_export",
                "prompt": {
                    "message_id": "1",
                    "role": "prompter",
                    "text": "q",
                    "lang": "en",
                    "replies": [{"message_id": "2", "role": "assistant", "text": "a", "lang": "en", "replies": []}],
                },
            }
        ],
        DOCUMENTS,
        None,
    ),
    "LMSYS's arena": (
        [
            {
                "question_id": "58210e39",
                "model_a": "chatglm-6b",
                "model_b": "koala-13b",
                "winner": "model_b",
                "judge": "arena_user_973",
                "conversation_a": WORSE,
                "conversation_b": TURNS,
                "turn": 1,
                "anony": True,
                "language": "English",
                "tstamp": 1682351591.1322,
                "toxic_chat_tag": {"roberta-large": {"flagged": False}},
                "openai_moderation": {"flagged": False, "category_scores": {"hate": 0.1}},
            }
        ],
        "preferences",
        None,
    ),
    "arena-55k": (
        [
            {
                "id": 30192,
                "model_a": "gpt-4-1106-preview",
                "model_b": "gpt-4-0613",
                "prompt": ["q"],
                "response_a": ["a"],
                "response_b": ["b"],
                "winner_model_a": 1,
                "winner_model_b": 0,
                "winner_tie": 0,
            }
        ],
        "preferences",
        None,
    ),
    "PKU-SafeRLHF": (
        [
            {
                "prompt": "q",
                "response_0": "b",
                "response_1": "a",
                "prompt_source": "Alpaca3-70B",
                "is_response_0_safe": False,
                "is_response_1_safe": True,
                "response_0_harm_category": {"Violence": False},
                "better_response_id": 1,
                "safer_response_id": 1,
                "response_0_sha256": "0f" * 32,
            }
        ],
        "preferences",
        None,
    ),
    "AlpacaFarm": (
        [{"instruction": "q", "input": "", "output_1": "a", "output_2": "b", "preference": 1}],
        "preferences",
        None,
    ),
    "Dolly": ([{"instruction": "q", "context": "", "response": "a", "category": "open_qa"}], DOCUMENTS, None),
    "Alpaca": ([{"instruction": "q", "input": "", "output": "a", "text": f"{LONG}\nq\na"[-20:]}], DOCUMENTS, None),
}
"""Name → rows with the columns of a published data set, their kind, and the margin of the pair."""


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("format", ["d.jsonl", "d.parquet"])
def test_published_data_sets_are_read(name: str, format: str, tmp_path: Path) -> None:
    rows, kind, margin = PUBLISHED[name]
    path = write_row_file(tmp_path, format, rows)
    (read,) = read_source(path)
    (training_record,) = get_training_readers(kind)[0](path, NOTHING)
    for record in (read.record, training_record):
        if kind == DOCUMENTS:
            assert isinstance(record, Conversation)
            assert record.messages == (U, A)
        else:
            assert isinstance(record, Preference)
            assert (record.prompt, record.chosen, record.rejected, record.margin) == ((U,), (A,), (B,), margin)
    kept_text = json.dumps(read.metadata, default=str) + json.dumps(list_texts(read.record))
    row_texts = [
        text
        for row in rows
        for text in iter_strings({column: value for column, value in row.items() if column not in ATTRIBUTES})
    ]
    assert "context" not in read.metadata
    assert all(
        json.dumps(text)[1:-1] in kept_text
        for text in row_texts
        if text not in ("prompter", "assistant", "user", "gpt")
    )


ATTRIBUTES = ("message_id", "source", "id", "role", "conversations", "prompt")
"""Columns whose texts a record may keep as attributes instead of metadata."""


def test_headers_in_any_case(tmp_path: Path) -> None:
    for name in ("d.csv", "d.tsv", "d.jsonl", "d.parquet"):
        path = write_row_file(tmp_path, name, [{"Question": "q", "Answer": "a", "SYSTEM": "s"}])
        (read,) = read_source(path)
        assert list_texts(read.record) == ["s", "q", "a"]
    for name in ("System Prompt", "system_message", "systemPrompt"):
        path = write_row_file(tmp_path, "d.jsonl", [{"prompt": "q", "completion": "a", name: "s"}])
        assert list_texts(read_source(path)[0].record) == ["s", "q", "a"]
    path = write_row_file(tmp_path, "d.jsonl", [{"Prompt": SHORT, "prompt": "q", "completion": "a"}])
    with pytest.raises(InputError, match="Prompt=shop notes: differs from `prompt` in case only"):
        read_source(path)
    (read,) = read_source(path, ColumnRules(metadata=["Prompt"]))
    assert (list_texts(read.record), read.metadata) == (["q", "a"], {"Prompt": SHORT})
    path = write_row_file(tmp_path, "d.csv", [{"Prompt": SHORT, "prompt": "", "Completion": "", "completion": "a"}])
    assert list_texts(read_source(path)[0].record) == [SHORT, "a"]
