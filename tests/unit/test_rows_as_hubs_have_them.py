"""Rows as data sets on the hub and APIs write them: JSON as text in columns, OpenAI's newer role, calls without
arguments, and personal data in names of arguments."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_reads import read_records

from align.core.types import Conversation, Message, Preference, Record, ToolCall
from align.data.clean.cleaner import Cleaner
from align.data.clean.steps import create_steps
from align.data.read.drops import BadRows

TURNS = [{"role": "user", "content": "Is it open?"}, {"role": "assistant", "content": "Yes."}]
SAID = (Message("user", "Is it open?"), Message("assistant", "Yes."))


def read_all_records(path: Path) -> list[Record]:
    bad_rows = BadRows(skips=False)
    records = [row_read.record for row_read in read_records(str(path), bad_rows=bad_rows)]
    bad_rows.report_refused_rows(path, len(records))
    return records


def parquet(path: Path, row: dict[str, Any]) -> None:
    pq.write_table(pa.Table.from_pylist([row]), path)


def arrow(path: Path, row: dict[str, Any]) -> None:
    table = pa.Table.from_pylist([row])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(("name", "write"), [("a.parquet", parquet), ("a.arrow", arrow)])
def test_columns_of_json_text(tmp_path: Path, name: str, write: Any) -> None:
    """A list may be given as JSON, as in a CSV file. A text that is no list of messages stays a text."""
    path = tmp_path / name
    write(path, {"messages": json.dumps(TURNS)})
    assert [record.messages for record in read_all_records(path) if isinstance(record, Conversation)] == [SAID]
    write(path, {"prompt": "[1, 2] or [3]?", "completion": "[1, 2]"})
    [record] = read_all_records(path)
    assert isinstance(record, Conversation)
    assert [turn.content for turn in record.messages] == ["[1, 2] or [3]?", "[1, 2]"]
    answers = [json.dumps([{"role": "assistant", "content": content}]) for content in ("Yes.", "No.")]
    write(path, {"prompt": json.dumps(TURNS[:1]), "chosen": answers[0], "rejected": answers[1], "margin": "0.5"})
    [pair] = read_all_records(path)
    assert isinstance(pair, Preference)
    assert (pair.prompt, pair.chosen, pair.margin) == (SAID[:1], SAID[1:], 0.5)


@pytest.mark.parametrize(
    "said", ["[]", '[{"name": "stock", "arguments": {}}]', '[{"role": "x"}, {"name": "y"}]', "[[]]"]
)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv"])
def test_an_answer_that_is_json_itself_is_a_text(tmp_path: Path, name: str, said: str) -> None:
    """Answers of models that call functions, or fill a schema, are JSON, and are not parsed as turns."""
    path = tmp_path / name
    row = {"prompt": f"Which list is {said}?", "completion": said}
    if name == "a.csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[*row], [*row.values()]])
    else:
        (parquet if name == "a.parquet" else arrow)(path, row)
    [record] = read_all_records(path)
    assert isinstance(record, Conversation)
    assert [turn.content for turn in record.messages] == [*row.values()]


def read_json_line(path: Path, row: dict[str, Any]) -> list[Record]:
    path.write_text(json.dumps(row) + "\n")
    return read_all_records(path)


def test_a_developer_speaks_as_the_system(tmp_path: Path) -> None:
    developer = {"role": "developer", "content": "Be brief."}
    [record] = read_json_line(tmp_path / "a.jsonl", {"messages": [developer, *TURNS]})
    assert isinstance(record, Conversation)
    assert record.messages == (Message("system", "Be brief."), *SAID)
    system = {"role": "system", "content": "You sell lamps."}
    [record] = read_json_line(tmp_path / "b.jsonl", {"messages": [system, developer, *TURNS]})
    assert isinstance(record, Conversation)
    assert [turn.role for turn in record.messages] == ["system", "system", "user", "assistant"]


@pytest.mark.parametrize("written", ["", " ", None, "{}", {}])
def test_a_call_without_arguments(tmp_path: Path, written: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": written}}
    row = {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    [record] = read_json_line(tmp_path / "a.jsonl", row)
    assert isinstance(record, Conversation)
    assert record.messages[1].tool_calls == (ToolCall("clock", "{}", "c"),)


ARGUMENTS = {"ann@example.org": 1, "bob@example.org": {"0": [{"carla@example.org": "dora@example.org"}]}}


def test_personal_data_in_names_of_arguments() -> None:
    call = ToolCall.from_arguments("send", ARGUMENTS)
    record = Conversation((Message("user", "Go"), Message("assistant", "", tool_calls=(call,))))
    cleaner = Cleaner(create_steps([{"pii": {"action": "mask"}}]))
    cleaned = cleaner.clean(record, 0)
    assert isinstance(cleaned, Conversation)
    arguments = cleaned.messages[1].tool_calls[0].arguments
    assert json.loads(arguments) == {"[EMAIL]": 1, "[EMAIL] 2": {"0": [{"[EMAIL]": "[EMAIL]"}]}}
    assert cleaner.clean(cleaned, 1) is cleaned
    assert "@" not in json.dumps([[example["before"], example["after"]] for example in cleaner.counts[0].examples])
    reports = Cleaner(create_steps([{"pii": {"action": "report"}}]))
    assert reports.clean(record, 0) is record
    assert reports.counts[0].notes == {"email": 1}
    assert "@" not in json.dumps([[example["before"], example["after"]] for example in reports.counts[0].examples])
