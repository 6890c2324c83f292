"""Tool calls and results of files: all forms read the same, or are refused by name, and all modules keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value
from json_lines import write_rows
from record_reads import read_records

from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Message, Preference, Tool, ToolCall
from align.data.pairs import encode_pairs
from align.data.read.content import to_content_row
from align.data.read.drops import BadRows
from align.data.read.preferences import write_preferences
from align.data.read.records import read_documents, read_preferences
from align.data.sources import DataSource, read_source_prompts
from align.data.split import compute_question_key, truncate_to_question

SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
USER = {"role": "user", "content": "Rain in Oslo?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "dry"}
ANSWER = {"role": "assistant", "content": "No."}
OPENAI = {"messages": [USER, CALL, RESULT, ANSWER], "tools": [SCHEMA]}

CALLED = ToolCall("weather", '{"city": "Oslo"}', "c1")
WEATHER = Tool.from_dict(SCHEMA)
READ = (
    Message("user", "Rain in Oslo?"),
    Message("assistant", "", tool_calls=(CALLED,)),
    Message("tool", "dry", tool_call_id="c1"),
    Message("assistant", "No."),
)


def read_row(tmp_path: Path, row: Any) -> Conversation:
    (conversation,) = read_documents(write_rows(tmp_path / "d.jsonl", [row]))
    assert isinstance(conversation, Conversation)
    return conversation


def remove_ids(turns: tuple[Message, ...]) -> list[Any]:
    calls = [[(call.name, call.arguments) for call in turn.tool_calls] for turn in turns]
    return [(turn.role, turn.content, turn_calls) for turn, turn_calls in zip(turns, calls, strict=True)]


# All forms have the same meaning.


def test_openai_s_form_is_read(tmp_path: Path) -> None:
    conversation = read_row(tmp_path, OPENAI)
    assert (conversation.messages, conversation.tools) == (READ, (WEATHER,))
    assert conversation.as_dicts() == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
            ],
        },
        RESULT,
        ANSWER,
    ]
    assert conversation.tool_dicts() == [SCHEMA]


BARE = {"name": "weather", "arguments": {"city": "Oslo"}}
FORMS: list[dict[str, Any]] = [
    {"messages": [USER, {**CALL, "content": ""}, RESULT, ANSWER], "tools": json.dumps([SCHEMA])},
    {
        "messages": [USER, {**CALL, "content": []}, {**RESULT, "content": [{"type": "text", "text": "dry"}]}, ANSWER],
        "tools": [json.dumps(SCHEMA)],
    },
    {
        "messages": [USER, {"role": "assistant", "tool_calls": json.dumps([OPENAI_CALL])}, RESULT, ANSWER],
        "tools": [SCHEMA["function"]],
        "functions": None,
    },
    {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": BARE},
            {"role": "function", "name": "weather", "content": "dry"},
            ANSWER,
        ],
        "functions": [SCHEMA["function"]],
    },
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": BARE}]},
            {"role": "tool", "name": "weather", "content": "dry"},
            ANSWER,
        ],
        "tools": [SCHEMA],
    },
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [BARE]},
            {"role": "ipython", "content": "dry"},
            ANSWER,
        ],
        "tools": [SCHEMA],
    },
    {
        "conversations": [
            {"from": "human", "value": "Rain in Oslo?"},
            {"from": "function_call", "value": json.dumps(BARE)},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps([SCHEMA["function"]]),
    },
    {
        "conversations": [
            {"from": "human", "value": "Rain in Oslo?"},
            {"from": "gpt", "value": "", "tool_calls": [BARE]},
            {"from": "tool", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": [SCHEMA],
    },
    {"prompt": [USER], "completion": [CALL, RESULT, ANSWER], "tools": [SCHEMA]},
]


@pytest.mark.parametrize("row", FORMS, ids=range(len(FORMS)))
def test_every_form_says_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    conversation = read_row(tmp_path, row)
    assert remove_ids(conversation.messages) == remove_ids(READ)
    assert conversation.tools == (WEATHER,)


def test_a_system_column_stands_beside_tools(tmp_path: Path) -> None:
    conversation = read_row(tmp_path, {**FORMS[6], "system": "Be brief."})
    assert conversation.messages[0] == Message("system", "Be brief.")
    assert conversation.tools == (WEATHER,)


def test_columns_of_arrow_are_read_as_rows_are(tmp_path: Path) -> None:
    """All structs of a column in Arrow have the same fields, with null for absent ones."""
    without_calls = {"messages": [USER, ANSWER], "tools": None}
    numbers = {"name": "sum", "parameters": {"type": "object", "properties": {"of": {"type": "array"}}}}
    calls = [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
        {"id": "b", "type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}},
    ]
    with_calls = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}],
        "tools": [SCHEMA, {"type": "function", "function": numbers}],
    }
    rows = [without_calls, with_calls]
    expected = [(record.messages, record.tools) for record in read_documents(write_rows(tmp_path / "d.jsonl", rows))]  # type: ignore[union-attr]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    features = Features({"messages": List(Json()), "tools": List(Json())})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "json.parquet"))
    features = Features({"messages": List(Json()), "tools": Value("string")})
    texts_of_tools = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    Dataset.from_list(texts_of_tools, features=features).save_to_disk(str(tmp_path / "saved"))
    for name in ("d.parquet", "json.parquet", "saved"):
        records = [(record.messages, record.tools) for record in read_documents(tmp_path / name)]  # type: ignore[union-attr]
        assert records == expected, name


def test_a_null_in_a_schema_of_json_stays(tmp_path: Path) -> None:
    schema = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"enum": ["a", None], "default": None}}},
    }
    conversation = read_row(tmp_path, {"messages": [USER, ANSWER], "tools": [schema]})
    assert json.loads(conversation.tools[0].schema)["function"] == schema


# Errors name field, value and remedy.


def build_refused_row(*turns: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [USER, *turns], "tools": [SCHEMA], **columns}


def calls(*of: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(of)}


def build_call(arguments: Any, name: Any = "weather", **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **more}


MALFORMED: list[tuple[dict[str, Any], str, str]] = [
    (
        build_refused_row(CALL, ANSWER),
        r"messages\[1\]\.tool_calls",
        r"weather \(c1\): has no result, and the conversation goes on",
    ),
    (build_refused_row(CALL, USER, ANSWER), r"messages\[1\]\.tool_calls", "goes on"),
    (
        build_refused_row(
            calls(build_call({}, id="a"), build_call({}, id="b")), {**RESULT, "tool_call_id": "b"}, ANSWER
        ),
        r"messages\[1\]\.tool_calls",
        r"weather \(a\): has no result",
    ),
    (
        build_refused_row(calls(build_call({}, id="a"), build_call({}, id="b")), {**RESULT, "tool_call_id": "b"}),
        r"messages\[1\]\.tool_calls",
        r"weather \(a\): has no result",
    ),
    (
        build_refused_row(RESULT, ANSWER),
        r"messages\[1\]\.role",
        "tool: is the result of a tool, but no call comes before it",
    ),
    (build_refused_row(CALL, RESULT, RESULT, ANSWER), r"messages\[3\]\.role", "no call comes before it"),
    (
        build_refused_row(CALL, {**RESULT, "tool_call_id": "c9"}, ANSWER),
        r"messages\[2\]\.tool_call_id",
        r"c9: is not the id of a call without a result \(c1\)",
    ),
    (
        build_refused_row(calls(BARE), RESULT, ANSWER),
        r"messages\[2\]\.tool_call_id",
        r"c1: is not the id of a call .*none has an id",
    ),
    (
        build_refused_row(calls(BARE), {"role": "tool", "name": "sum", "content": "1"}, ANSWER),
        r"messages\[2\]\.name",
        r"sum: is not the name of a tool whose result is still missing \(weather\)",
    ),
    (
        build_refused_row(calls(build_call("{city: Oslo}"))),
        r"messages\[1\]\.tool_calls\[0\]\.arguments",
        "{city: Oslo}: is no JSON object",
    ),
    (build_refused_row(calls(build_call("[1]"))), r"messages\[1\]\.tool_calls\[0\]\.arguments", "is no JSON object"),
    (build_refused_row(calls(build_call(3))), r"messages\[1\]\.tool_calls\[0\]\.arguments", "3: is no JSON object"),
    (
        build_refused_row(calls(build_call('{"a": NaN}'))),
        r"messages\[1\]\.tool_calls\[0\]\.arguments",
        "is no JSON object",
    ),
    (
        build_refused_row(calls(build_call('{"a": 1, "a": 2}'))),
        r"messages\[1\]\.tool_calls\[0\]\.arguments",
        "key a twice",
    ),
    (
        build_refused_row(calls(build_call('{"a": "\\ud800"}'))),
        r"messages\[1\]\.tool_calls\[0\]\.arguments\.a",
        "half a character",
    ),
    (build_refused_row(calls(build_call('{"a": ' * 99 + "1" + "}" * 99))), "messages", "nested too deeply"),
    (
        build_refused_row(calls(build_call({}, name="sum"))),
        r"messages\[1\]\.tool_calls\[0\]\.name",
        r"sum: calls a tool that is not among those offered \(weather\)",
    ),
    (build_refused_row(calls(build_call({}, name=None))), r"messages\[1\]\.tool_calls\[0\]", "names no tool"),
    (build_refused_row(calls("weather")), r"messages\[1\]\.tool_calls\[0\]", "weather: is no call"),
    (
        build_refused_row(calls(build_call({}, type="custom"))),
        r"messages\[1\]\.tool_calls\[0\]\.type",
        "custom: is a type of call",
    ),
    (build_refused_row(calls(build_call({}, id=3))), r"messages\[1\]\.tool_calls\[0\]\.id", "3: is no text"),
    (
        build_refused_row(calls(build_call({}, id="a"), build_call({}, id="a"))),
        r"messages\[1\]\.tool_calls\[1\]\.id",
        "of two calls",
    ),
    (
        build_refused_row({**ANSWER, "tool_calls": "call it"}),
        r"messages\[1\]\.tool_calls",
        "call it: is no list of calls",
    ),
    (build_refused_row({**CALL, "function_call": BARE}), r"messages\[1\]\.tool_calls", "stands beside function_call"),
    (build_refused_row({**USER, "tool_calls": [BARE]}), r"messages\[1\]\.tool_calls", "in a turn of the user"),
    (build_refused_row({**ANSWER, "tool_call_id": "c1"}), r"messages\[1\]\.tool_call_id", "in a turn of the assistant"),
    (build_refused_row(CALL, {**RESULT, "content": None}), r"messages\[2\]\.content", "is missing"),
    (build_refused_row(CALL, {**RESULT, "content": {"a": 1}}), r"messages\[2\]\.content", "is no text"),
    (build_refused_row(CALL, {**RESULT, "train": True}), r"messages\[2\]\.train", "asks to train on a tool turn"),
    (build_refused_row(ANSWER, tools="weather"), "tools", "weather: is no list of tools"),
    (build_refused_row(ANSWER, tools=[3]), r"tools\[0\]", "is no schema of a tool"),
    (build_refused_row(ANSWER, tools=[{"type": "function"}]), r"tools\[0\]", "names no function"),
    (build_refused_row(ANSWER, tools=[{"type": "retrieval"}]), r"tools\[0\]\.type", "retrieval: is a type of tool"),
    (build_refused_row(ANSWER, tools=[{"name": "f", "parameters": []}]), r"tools\[0\]\.parameters", "is not an object"),
    (build_refused_row(ANSWER, tools=[{"name": "f", "description": 3}]), r"tools\[0\]\.description", "is not a text"),
    (build_refused_row(ANSWER, tools=[SCHEMA, SCHEMA]), r"tools\[1\]", "weather: is offered twice"),
    (build_refused_row(ANSWER, functions=[SCHEMA]), "tools", "stands beside functions"),
    ({"text": "t", "tools": [SCHEMA]}, "tools", "stands beside plain text"),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "call it"}]},
        r"conversations\[1\]\.value",
        "call it: is no call of a tool",
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": "4"}]},
        r"conversations\[1\]\.role",
        "no call comes before it",
    ),
]


@pytest.mark.parametrize(("row", "field", "problem"), MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_wrong_is_told(tmp_path: Path, row: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InputError, match=rf"d\.jsonl, row 1, {field}=.*({problem})") as caught:
        read_row(tmp_path, row)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_bad_rows_are_skipped_and_counted(tmp_path: Path, capsys: Any) -> None:
    path = write_rows(tmp_path / "d.jsonl", [OPENAI, build_refused_row(CALL, ANSWER), build_refused_row(RESULT)])
    assert len(read_documents(path, skip_bad_rows=True)) == 1
    assert "left out 2 rows" in capsys.readouterr().out


def test_pairs_and_feedback_hold_calls(tmp_path: Path) -> None:
    pair = {"prompt": [USER], "chosen": [CALL], "rejected": [ANSWER], "tools": [SCHEMA]}
    implicit = {"chosen": [USER, CALL], "rejected": [USER, ANSWER], "tools": json.dumps([SCHEMA])}
    preferences = read_preferences(write_rows(tmp_path / "p.jsonl", [pair, implicit]))
    for row in preferences:
        assert (row.prompt, row.chosen, row.rejected, row.tools) == (
            READ[:1],
            READ[1:2],
            READ[3:],
            (WEATHER,),
        )
    write_preferences(tmp_path / "again.jsonl", preferences)
    assert [to_content_row(preference) for preference in read_preferences(tmp_path / "again.jsonl")] == [
        to_content_row(preference) for preference in preferences
    ]
    labelled = {"prompt": [USER, CALL, RESULT], "completion": [ANSWER], "label": True, "tools": [SCHEMA]}
    (row,) = read_records(str(write_rows(tmp_path / "k.jsonl", [labelled])), bad_rows=BadRows())
    assert isinstance(row.record, Feedback)
    assert (row.record.prompt, row.record.tools) == (READ[:3], (WEATHER,))
    bad = {**pair, "chosen": [CALL, ANSWER]}
    with pytest.raises(InputError, match=r"row 1, chosen\[0\]\.tool_calls=.*has no result"):
        read_preferences(write_rows(tmp_path / "bad.jsonl", [bad]))
    bad_rows = BadRows()
    path = write_rows(tmp_path / "b.jsonl", [{**build_refused_row(CALL, ANSWER), "label": True}])
    assert not list(read_records(str(path), bad_rows=bad_rows))
    with pytest.raises(InputError, match=r"row 1, messages\[1\]\.tool_calls=.*has no result"):
        bad_rows.report_refused_rows(path, 0)


def test_pairs_of_one_prompt_with_other_tools_are_encoded_apart(tool_tokenizer: Any) -> None:
    sum_tool = Tool.from_dict({"name": "sum"})
    pairs = [Preference(READ[:1], READ[1:2], READ[3:], tools=tools) for tools in ((WEATHER,), (WEATHER, sum_tool))]
    encoded, _ = encode_pairs(tool_tokenizer, pairs, (tool_tokenizer.eos_token_id,), 2000)
    assert encoded[0][1].chosen_ids != encoded[1][1].chosen_ids
    chosen_text = tool_tokenizer.decode(encoded[0][1].chosen_ids[encoded[0][1].chosen_start :])
    assert chosen_text == '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><end>'


# Questions: where an answer is due.


def test_a_question_ends_with_the_user_or_with_results(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "d.jsonl", [OPENAI, {"messages": [USER, CALL], "tools": [SCHEMA]}, build_refused_row(CALL, RESULT)]
    )
    questions = read_source_prompts(DataSource("jsonl", str(path), held_out=0.0), "train")
    assert sorted(len(question.messages) for question in questions) == [1, 3, 3]
    assert all(question.tools == (WEATHER,) for question in questions)


def test_a_question_is_the_same_whatever_its_tools_return(tmp_path: Path) -> None:
    with_other_result = read_row(
        tmp_path, build_refused_row(CALL, {**RESULT, "content": "wet"}, {**ANSWER, "content": "Yes."})
    )
    assert (
        compute_question_key(read_row(tmp_path, OPENAI))
        == compute_question_key(with_other_result)
        == compute_question_key(Conversation(READ[:1]))
    )
    assert truncate_to_question(Conversation((Message("assistant", "a"),))) is None


def test_a_tool_is_one_tool_in_whatever_form_it_is_given():
    flat = {"type": "function", **SCHEMA["function"]}  # the form of OpenAI's Responses API
    reversed_keys = {"function": dict(reversed(SCHEMA["function"].items())), "type": "function"}
    assert Tool.from_dict(flat) == Tool.from_dict(SCHEMA["function"]) == Tool.from_dict(reversed_keys) == WEATHER
    assert WEATHER.as_dict() == SCHEMA
