"""Tool calls and results as files write them: read alike whatever the form, or refused by name; kept by every room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value
from record_reads import read_records

from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Message, Preference, Tool, ToolCall
from align.data.pairs import encode_pairs
from align.data.read.content import to_content_row
from align.data.read.drops import BadRows
from align.data.read.records import read_documents, read_preferences, write_preferences
from align.data.sources import DataSource, read_source_prompts
from align.data.split import compute_question_key, truncate_to_question

SCHEMA = {"type": "function", "function": {
    "name": "weather", "description": "Weather of a place.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}}  # fmt: skip
OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
USER = {"role": "user", "content": "Rain in Oslo?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "dry"}
ANSWER = {"role": "assistant", "content": "No."}
OPENAI = {"messages": [USER, CALL, RESULT, ANSWER], "tools": [SCHEMA]}

CALLED = ToolCall("weather", '{"city": "Oslo"}', "c1")
WEATHER = Tool.from_dict(SCHEMA)
READ = (
    Message("user", "Rain in Oslo?"), Message("assistant", "", tool_calls=(CALLED,)),
    Message("tool", "dry", tool_call_id="c1"), Message("assistant", "No."),
)  # fmt: skip


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(tmp_path: Path, row: Any) -> Conversation:
    (found,) = read_documents(write(tmp_path / "d.jsonl", row))
    assert isinstance(found, Conversation)
    return found


def without_ids(turns: tuple[Message, ...]) -> list[Any]:
    calls = [[(call.name, call.arguments) for call in turn.tool_calls] for turn in turns]
    return [(turn.role, turn.content, found) for turn, found in zip(turns, calls, strict=True)]


# One meaning in every form.


def test_openai_s_form_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, OPENAI)
    assert (found.messages, found.tools) == (READ, (WEATHER,))
    assert found.as_dicts() == [
        USER, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
        RESULT, ANSWER,
    ]  # fmt: skip
    assert found.tool_dicts() == [SCHEMA]


BARE = {"name": "weather", "arguments": {"city": "Oslo"}}
FORMS: list[dict[str, Any]] = [
    {"messages": [USER, {**CALL, "content": ""}, RESULT, ANSWER], "tools": json.dumps([SCHEMA])},
    {"messages": [USER, {**CALL, "content": []}, {**RESULT, "content": [{"type": "text", "text": "dry"}]}, ANSWER],
     "tools": [json.dumps(SCHEMA)]},
    {"messages": [USER, {"role": "assistant", "tool_calls": json.dumps([OPENAI_CALL])}, RESULT, ANSWER],
     "tools": [SCHEMA["function"]], "functions": None},
    {"messages": [USER, {"role": "assistant", "content": None, "function_call": BARE},
                  {"role": "function", "name": "weather", "content": "dry"}, ANSWER],
     "functions": [SCHEMA["function"]]},
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": BARE}]},
                  {"role": "tool", "name": "weather", "content": "dry"}, ANSWER], "tools": [SCHEMA]},
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [BARE]},
                  {"role": "ipython", "content": "dry"}, ANSWER], "tools": [SCHEMA]},
    {"conversations": [{"from": "human", "value": "Rain in Oslo?"},
                       {"from": "function_call", "value": json.dumps(BARE)},
                       {"from": "observation", "value": "dry"}, {"from": "gpt", "value": "No."}],
     "tools": json.dumps([SCHEMA["function"]])},
    {"conversations": [{"from": "human", "value": "Rain in Oslo?"}, {"from": "gpt", "value": "", "tool_calls": [BARE]},
                       {"from": "tool", "value": "dry"}, {"from": "gpt", "value": "No."}], "tools": [SCHEMA]},
    {"prompt": [USER], "completion": [CALL, RESULT, ANSWER], "tools": [SCHEMA]},
]  # fmt: skip


@pytest.mark.parametrize("row", FORMS, ids=range(len(FORMS)))
def test_every_form_says_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read(tmp_path, row)
    assert without_ids(found.messages) == without_ids(READ)
    assert found.tools == (WEATHER,)


def test_a_system_column_stands_beside_tools(tmp_path: Path) -> None:
    found = read(tmp_path, {**FORMS[6], "system": "Be brief."})
    assert found.messages[0] == Message("system", "Be brief.")
    assert found.tools == (WEATHER,)


def test_columns_of_arrow_are_read_as_rows_are(tmp_path: Path) -> None:
    """All structs of a column have the same fields there, with null where others have something."""
    other = {"messages": [USER, ANSWER], "tools": None}
    numbers = {"name": "sum", "parameters": {"type": "object", "properties": {"of": {"type": "array"}}}}
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
             {"id": "b", "type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}}]  # fmt: skip
    third = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}],
             "tools": [SCHEMA, {"type": "function", "function": numbers}]}  # fmt: skip
    rows = [other, third]
    expected = [(one.messages, one.tools) for one in read_documents(write(tmp_path / "d.jsonl", *rows))]  # type: ignore[union-attr]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    features = Features({"messages": List(Json()), "tools": List(Json())})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "json.parquet"))
    features = Features({"messages": List(Json()), "tools": Value("string")})
    texts_of_tools = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    Dataset.from_list(texts_of_tools, features=features).save_to_disk(str(tmp_path / "saved"))
    for name in ("d.parquet", "json.parquet", "saved"):
        found = [(one.messages, one.tools) for one in read_documents(tmp_path / name)]  # type: ignore[union-attr]
        assert found == expected, name


def test_a_null_in_a_schema_of_json_stays(tmp_path: Path) -> None:
    schema = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"enum": ["a", None], "default": None}}},
    }
    found = read(tmp_path, {"messages": [USER, ANSWER], "tools": [schema]})
    assert json.loads(found.tools[0].schema)["function"] == schema


# What is wrong is told by field, value and remedy.


def refused(*turns: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [USER, *turns], "tools": [SCHEMA], **columns}


def calls(*of: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(of)}


def called(arguments: Any, name: Any = "weather", **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **more}


MALFORMED: list[tuple[dict[str, Any], str, str]] = [
    (refused(CALL, ANSWER), r"messages\[1\]\.tool_calls",
     r"weather \(c1\): has no result, and the conversation goes on"),
    (refused(CALL, USER, ANSWER), r"messages\[1\]\.tool_calls", "goes on"),
    (refused(calls(called({}, id="a"), called({}, id="b")), {**RESULT, "tool_call_id": "b"}, ANSWER),
     r"messages\[1\]\.tool_calls", r"weather \(a\): has no result"),
    (refused(calls(called({}, id="a"), called({}, id="b")), {**RESULT, "tool_call_id": "b"}),
     r"messages\[1\]\.tool_calls", r"weather \(a\): has no result"),
    (refused(RESULT, ANSWER), r"messages\[1\]\.role", "tool: is the result of a tool, and no call stands before it"),
    (refused(CALL, RESULT, RESULT, ANSWER), r"messages\[3\]\.role", "no call stands before it"),
    (refused(CALL, {**RESULT, "tool_call_id": "c9"}, ANSWER), r"messages\[2\]\.tool_call_id",
     r"c9: is the id of no call that waits for a result \(c1\)"),
    (refused(calls(BARE), RESULT, ANSWER), r"messages\[2\]\.tool_call_id",
     r"c1: is the id of no call .*none has an id"),
    (refused(calls(BARE), {"role": "tool", "name": "sum", "content": "1"}, ANSWER), r"messages\[2\]\.name",
     r"sum: is the name of no tool whose result is due \(weather\)"),
    (refused(calls(called("{city: Oslo}"))), r"messages\[1\]\.tool_calls\[0\]\.arguments",
     "{city: Oslo}: is no JSON object"),
    (refused(calls(called("[1]"))), r"messages\[1\]\.tool_calls\[0\]\.arguments", "is no JSON object"),
    (refused(calls(called(3))), r"messages\[1\]\.tool_calls\[0\]\.arguments", "3: is no JSON object"),
    (refused(calls(called('{"a": NaN}'))), r"messages\[1\]\.tool_calls\[0\]\.arguments", "is no JSON object"),
    (refused(calls(called('{"a": 1, "a": 2}'))), r"messages\[1\]\.tool_calls\[0\]\.arguments", "key a twice"),
    (refused(calls(called('{"a": "\\ud800"}'))), r"messages\[1\]\.tool_calls\[0\]\.arguments\.a", "half a character"),
    (refused(calls(called('{"a": ' * 99 + "1" + "}" * 99))), "messages", "nested too deeply"),
    (refused(calls(called({}, name="sum"))), r"messages\[1\]\.tool_calls\[0\]\.name",
     r"sum: calls a tool that is not among those offered \(weather\)"),
    (refused(calls(called({}, name=None))), r"messages\[1\]\.tool_calls\[0\]", "names no tool"),
    (refused(calls("weather")), r"messages\[1\]\.tool_calls\[0\]", "weather: is no call"),
    (refused(calls(called({}, type="custom"))), r"messages\[1\]\.tool_calls\[0\]\.type", "custom: is a kind of calls"),
    (refused(calls(called({}, id=3))), r"messages\[1\]\.tool_calls\[0\]\.id", "3: is no text"),
    (refused(calls(called({}, id="a"), called({}, id="a"))), r"messages\[1\]\.tool_calls\[1\]\.id", "of two calls"),
    (refused({**ANSWER, "tool_calls": "call it"}), r"messages\[1\]\.tool_calls", "call it: is no list of calls"),
    (refused({**CALL, "function_call": BARE}), r"messages\[1\]\.tool_calls", "stands beside function_call"),
    (refused({**USER, "tool_calls": [BARE]}), r"messages\[1\]\.tool_calls", "in a turn of the user"),
    (refused({**ANSWER, "tool_call_id": "c1"}), r"messages\[1\]\.tool_call_id", "in a turn of the assistant"),
    (refused(CALL, {**RESULT, "content": None}), r"messages\[2\]\.content", "is missing"),
    (refused(CALL, {**RESULT, "content": {"a": 1}}), r"messages\[2\]\.content", "is no text"),
    (refused(CALL, {**RESULT, "train": True}), r"messages\[2\]\.train", "asks to train on a tool turn"),
    (refused(ANSWER, tools="weather"), "tools", "weather: is no list of tools"),
    (refused(ANSWER, tools=[3]), r"tools\[0\]", "is no schema of a tool"),
    (refused(ANSWER, tools=[{"type": "function"}]), r"tools\[0\]", "names no function"),
    (refused(ANSWER, tools=[{"type": "retrieval"}]), r"tools\[0\]\.type", "retrieval: is a kind of tools"),
    (refused(ANSWER, tools=[{"name": "f", "parameters": []}]), r"tools\[0\]\.parameters", "is not an object"),
    (refused(ANSWER, tools=[{"name": "f", "description": 3}]), r"tools\[0\]\.description", "is not a text"),
    (refused(ANSWER, tools=[SCHEMA, SCHEMA]), r"tools\[1\]", "weather: is offered twice"),
    (refused(ANSWER, functions=[SCHEMA]), "tools", "stands beside functions"),
    ({"text": "t", "tools": [SCHEMA]}, "tools", "stands beside plain text"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "call it"}]},
     r"conversations\[1\]\.value", "call it: is no call of a tool"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "4"}]},
     r"conversations\[1\]\.role", "no call stands before it"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "problem"), MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_wrong_is_told(tmp_path: Path, row: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InputError, match=rf"d\.jsonl, row 1, {field}=.*({problem})") as caught:
        read(tmp_path, row)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "d.jsonl", OPENAI, refused(CALL, ANSWER), refused(RESULT))
    assert len(read_documents(path, skip_bad_rows=True)) == 1
    assert "left out 2 rows" in capsys.readouterr().out


def test_pairs_and_feedback_hold_calls(tmp_path: Path) -> None:
    pair = {"prompt": [USER], "chosen": [CALL], "rejected": [ANSWER], "tools": [SCHEMA]}
    implicit = {"chosen": [USER, CALL], "rejected": [USER, ANSWER], "tools": json.dumps([SCHEMA])}
    found = read_preferences(write(tmp_path / "p.jsonl", pair, implicit))
    for one in found:
        assert (one.prompt, one.chosen, one.rejected, one.tools) == (READ[:1], READ[1:2], READ[3:], (WEATHER,))
    write_preferences(tmp_path / "again.jsonl", found)
    assert [to_content_row(one) for one in read_preferences(tmp_path / "again.jsonl")] == [
        to_content_row(one) for one in found
    ]
    labelled = {"prompt": [USER, CALL, RESULT], "completion": [ANSWER], "label": True, "tools": [SCHEMA]}
    (one,) = read_records(str(write(tmp_path / "k.jsonl", labelled)), bad_rows=BadRows())
    assert isinstance(one.record, Feedback)
    assert (one.record.prompt, one.record.tools) == (READ[:3], (WEATHER,))
    bad = {**pair, "chosen": [CALL, ANSWER]}
    with pytest.raises(InputError, match=r"row 1, chosen\[0\]\.tool_calls=.*has no result"):
        read_preferences(write(tmp_path / "bad.jsonl", bad))
    bad_rows = BadRows()
    path = write(tmp_path / "b.jsonl", {**refused(CALL, ANSWER), "label": True})
    assert not list(read_records(str(path), bad_rows=bad_rows))
    with pytest.raises(InputError, match=r"row 1, messages\[1\]\.tool_calls=.*has no result"):
        bad_rows.report_refused_rows(path, 0)


def test_pairs_of_one_prompt_with_other_tools_are_encoded_apart(tool_tokenizer: Any) -> None:
    other = Tool.from_dict({"name": "sum"})
    pairs = [Preference(READ[:1], READ[1:2], READ[3:], tools=tools) for tools in ((WEATHER,), (WEATHER, other))]
    kept, _ = encode_pairs(tool_tokenizer, pairs, (tool_tokenizer.eos_token_id,), 2000)
    assert kept[0][1].chosen_ids != kept[1][1].chosen_ids
    said = tool_tokenizer.decode(kept[0][1].chosen_ids[kept[0][1].chosen_start :])
    assert said == '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><end>'


# Questions: where an answer is due.


def test_a_question_ends_with_the_user_or_with_results(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", OPENAI, {"messages": [USER, CALL], "tools": [SCHEMA]}, refused(CALL, RESULT))
    asked = read_source_prompts(DataSource("jsonl", str(path), held_out=0.0), "train")
    assert sorted(len(one.messages) for one in asked) == [1, 3, 3]
    assert all(one.tools == (WEATHER,) for one in asked)


def test_a_question_is_the_same_whatever_its_tools_return(tmp_path: Path) -> None:
    other = read(tmp_path, refused(CALL, {**RESULT, "content": "wet"}, {**ANSWER, "content": "Yes."}))
    assert (
        compute_question_key(read(tmp_path, OPENAI))
        == compute_question_key(other)
        == compute_question_key(Conversation(READ[:1]))
    )
    assert truncate_to_question(Conversation((Message("assistant", "a"),))) is None


def test_a_tool_is_one_tool_in_whatever_form_it_is_given():
    flat = {"type": "function", **SCHEMA["function"]}  # as OpenAI's responses have it
    turned = {"function": dict(reversed(SCHEMA["function"].items())), "type": "function"}
    assert Tool.from_dict(flat) == Tool.from_dict(SCHEMA["function"]) == Tool.from_dict(turned) == WEATHER
    assert WEATHER.as_dict() == SCHEMA
