"""Tool calls and results after reading: content ids, columns, comparison, cleaning, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_lines import write_rows
from test_tool_rows import ANSWER, CALL, READ, RESULT, SCHEMA, USER, WEATHER

from align.annotate.exchange.importing import import_items
from align.annotate.store import Candidate, Store
from align.core.errors import InputError
from align.core.types import Conversation, Feedback, Message, Preference, Record, Tool, ToolCall
from align.data.clean.cleaner import Cleaner
from align.data.clean.outcome import Drop
from align.data.clean.steps import create_steps
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES, encode_content_row, list_texts, to_content_row
from align.data.sets.ids import compute_content_id
from align.data.sets.published import convert_column
from align.data.sets.record_columns import (
    JSON_TURNS,
    columns_to_records,
    join_complete_texts,
    join_record_texts,
    records_to_columns,
)
from align.data.sets.report import format_row_text

# Records with tools keep their meaning in every module.


def test_content_ids_of_rows_without_tools_are_what_they_were() -> None:
    plain = Conversation((Message("system", "S"), Message("user", "u"), Message("assistant", "a", trained=False)))
    assert to_content_row(plain) == {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a", "train": False},
        ]
    }
    # The id from before tools were supported.
    assert (
        compute_content_id(encode_content_row(plain)).hex()
        == "db472d67649a28bb788ef2016ded99e424d422531439429cef5d100b6513c4fa"
    )


def test_content_ids_go_by_calls_results_and_tools_and_not_by_the_order_of_keys() -> None:
    def build_record(arguments: str, tools: tuple[Tool, ...] = (WEATHER,), result: str = "dry") -> Conversation:
        call = ToolCall.from_arguments("weather", json.loads(arguments), "c1")
        turns = (READ[0], Message("assistant", "", tool_calls=(call,)), Message("tool", result, tool_call_id="c1"))
        return Conversation(turns, tools=tools)

    equal_records = build_record('{"a": 1, "b": 2}'), build_record('{"b": 2, "a": 1}')
    assert compute_content_id(encode_content_row(equal_records[0])) == compute_content_id(
        encode_content_row(equal_records[1])
    )
    different_records = (
        build_record('{"a": 1}'),
        build_record('{"a": 1, "b": 2}', ()),
        build_record('{"a": 1, "b": 2}', result="wet"),
    )
    assert (
        len({compute_content_id(encode_content_row(record)) for record in (equal_records[0], *different_records)}) == 4
    )


TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(-1e300, 1e300) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
NAME = st.sampled_from(["f", "weather", "né \n"])
CALLS = st.builds(
    ToolCall.from_arguments, NAME, st.dictionaries(TEXT, JSON, max_size=2), st.sampled_from(["", "c1", "c 2"])
)
TURN = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXT, st.booleans()),
    st.builds(Message, st.just("assistant"), TEXT, st.booleans(), st.lists(CALLS, max_size=2).map(tuple)),
    st.builds(
        Message, st.just("tool"), TEXT, tool_call_id=st.sampled_from(["", "c1"]), name=st.sampled_from(["", "f"])
    ),
)
TURNS = st.lists(TURN, min_size=1, max_size=4).map(tuple)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": NAME}, optional={"description": TEXT, "parameters": st.dictionaries(TEXT, JSON, max_size=2)}
    ),
    max_size=2,
).map(lambda schemas: tuple(map(Tool.from_dict, schemas)))
RECORDS: dict[str, Any] = {
    DOCUMENTS: st.builds(Conversation, TURNS, st.just("?"), TOOLS) | TEXT,
    FEEDBACK: st.builds(Feedback, TURNS, TURNS, st.booleans(), st.just("?"), TOOLS),
    PREFERENCES: st.tuples(TURNS, TURNS, TURNS)
    .filter(lambda p: p[1] != p[2])
    .flatmap(lambda p: st.builds(Preference, *map(st.just, p), id=TEXT, tools=TOOLS)),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_come_back_from_columns_and_from_parquet(kind: str, tmp_path: Path) -> None:
    @settings(max_examples=60)
    @given(st.lists(RECORDS[kind], min_size=1, max_size=4))
    def check_round_trip(records: list[Record]) -> None:
        batch = pa.RecordBatch.from_pydict(records_to_columns(kind, records))
        names = ["?"] * len(records)
        assert columns_to_records(kind, batch, names) == records
        for start in (0, 1):  # a slice has offsets
            lists = {"messages", "prompt", "chosen", "rejected", "completion", "tools"}
            columns = {
                name: convert_column(column, JSON_TURNS) if name in lists else column
                for name, column in zip(batch.schema.names, batch.slice(start).columns, strict=True)
            }
            pq.write_table(pa.table(columns), tmp_path / "x.parquet")
            assert columns_to_records(kind, pq.read_table(tmp_path / "x.parquet"), names[start:]) == records[start:]

    check_round_trip()


def test_calls_and_results_are_compared_and_ids_are_not() -> None:
    with_other_ids = Conversation(
        tuple(
            Message(
                m.role,
                m.content,
                tool_calls=tuple(ToolCall(c.name, c.arguments, "z") for c in m.tool_calls),
                tool_call_id="z" if m.role == "tool" else "",
            )
            for m in READ
        ),
        tools=(WEATHER,),
    )
    records: list[Record] = [Conversation(READ, tools=(WEATHER,)), with_other_ids, Conversation(READ), "plain"]
    batch = pa.RecordBatch.from_pydict(records_to_columns(DOCUMENTS, records))
    all_texts, prompt_texts, answer_texts = (
        join_record_texts(DOCUMENTS, batch, over).to_pylist() for over in ("both", "prompts", "answers")
    )
    call_line = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert all_texts == [f"Rain in Oslo?\n\n{call_line}\ndry\nNo."] * 3 + ["plain"]
    assert prompt_texts == ["Rain in Oslo?"] * 3 + ["plain"]
    assert answer_texts == [f"\n{call_line}\nNo."] * 3 + ["plain"]
    complete_texts = join_complete_texts(batch).to_pylist()
    # The same turns with other tools are another example.
    assert complete_texts[0] == complete_texts[1] != complete_texts[2]
    assert call_line in complete_texts[0]


def test_a_report_shows_calls() -> None:
    assert format_row_text(to_content_row(Conversation(READ, tools=(WEATHER,)))) == (
        'tools: weather\nuser: Rain in Oslo?\nassistant: calls weather {"city": "Oslo"}\ntool: dry\nassistant: No.'
    )


# Cleaning.


def clean_record(record: Record, *steps: Any) -> Record | Drop:
    return Cleaner(create_steps(list(steps))).clean(record, 0)


def build_call_conversation(arguments: Any, result: str = "dry", text: str = "") -> Conversation:
    call = ToolCall.from_arguments("weather", arguments, "c1")
    turns = (
        READ[0],
        Message("assistant", text, tool_calls=(call,)),
        Message("tool", result, tool_call_id="c1"),
        READ[3],
    )
    return Conversation(turns, tools=(WEATHER,))


def test_personal_data_is_masked_in_results_and_in_arguments_which_stay_json() -> None:
    arguments = {"to": ["ann@mail.org"], "n": 3, 'a"b': {"x": 'say "hi" to ann@mail.org'}}
    masked = clean_record(build_call_conversation(arguments, '{"mail": "bo@mail.org"}'), "pii")
    assert isinstance(masked, Conversation)
    call = masked.messages[1].tool_calls[0]
    assert json.loads(call.arguments) == {"to": ["[EMAIL]"], "n": 3, 'a"b': {"x": 'say "hi" to [EMAIL]'}}
    assert (call.id, masked.messages[2].content) == ("c1", '{"mail": "[EMAIL]"}')
    assert clean_record(build_call_conversation({"to": "ann@mail.org"}), {"pii": {"action": "drop"}}) == Drop(
        "pii: email", "[EMAIL]"
    )


def test_text_is_repaired_in_arguments_too() -> None:
    repaired = clean_record(build_call_conversation({"city": "schÃ¶n\u200b\x07"}, "a\r\nb\u200b"), "unicode", "control")
    assert isinstance(repaired, Conversation)
    assert json.loads(repaired.messages[1].tool_calls[0].arguments) == {"city": "schön"}
    assert repaired.messages[2].content == "a\nb"


def test_calls_say_something_and_tools_may_return_nothing() -> None:
    without_text = build_call_conversation({}, "")
    assert clean_record(without_text, "empty", "roles") is without_text
    without_result = Conversation(without_text.messages[:2], tools=(WEATHER,))
    assert clean_record(without_result, "empty", "roles") is without_result
    without_answer = Conversation(without_text.messages[:3], tools=(WEATHER,))
    assert isinstance(clean_record(without_answer, "roles"), Drop)
    assert clean_record(without_answer, {"roles": {"ends": "any"}}) is without_answer
    with_blank_answer = Conversation((*without_text.messages[:3], Message("assistant", " ")), tools=(WEATHER,))
    # The empty answer is removed, and the result without an answer.
    assert clean_record(with_blank_answer, "empty") == without_result
    with_second_question = Conversation((*without_text.messages[:2], *without_text.messages[:1]), tools=(WEATHER,))
    assert isinstance(clean_record(with_second_question, "roles"), Drop)


def test_length_counts_calls_and_results_and_language_does_not_look_at_them() -> None:
    record = build_call_conversation({"city": "one two three"}, "four five", "six")
    assert len(" ".join(list_texts(record)).split()) == 3 + 1 + 3 + 2 + 1
    assert clean_record(record, {"length": {"most": 10}}) is record
    assert isinstance(clean_record(record, {"length": {"most": 9}}), Drop)
    german = "Der Hund und die Katze wohnen seit vielen Jahren zusammen in einem kleinen Haus am See"
    question = Message("user", "Please tell me what the weather is going to be like tomorrow")
    in_two_languages = Conversation((question, *build_call_conversation({"q": german}, german).messages[1:]))
    assert clean_record(in_two_languages, {"language": {"keep": ["en"]}}) is in_two_languages


def test_a_function_of_the_user_s_reads_and_writes_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    import test_tool_data  # the module that the step imports

    record = build_call_conversation({"city": "Oslo"})
    rows: list[Any] = []
    monkeypatch.setattr(test_tool_data, "own", lambda row: rows.append(row) or row, raising=False)
    assert clean_record(record, {"fn": "test_tool_data:own"}) is record
    assert rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    monkeypatch.setattr(
        test_tool_data, "own", lambda row: {**row, "messages": row["messages"][:2] + row["messages"][3:]}
    )
    with pytest.raises(InputError, match=r"cannot be read.*has no result"):
        clean_record(record, {"fn": "test_tool_data:own"})


# Rows that cannot be shown are refused; nothing is lost when they are written.


def test_the_annotation_store_refuses_what_its_page_does_not_show(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/votes.db") as store:
        answers = [Candidate("a"), Candidate("b")]
        for prompt in (Conversation(READ[:3]), Conversation(READ[:1], tools=(WEATHER,))):
            with pytest.raises(InputError, match="offers or calls tools, which the annotation page does not show"):
                store.add_item("p", "k", prompt, answers)
        row = {"prompt": [USER, CALL, RESULT, ANSWER, USER], "answers": ["a", "b"]}
        with pytest.raises(InputError, match=r"row 1, prompt=.*calls tools, which the annotation page does not show"):
            import_items(store, "p", write_rows(tmp_path / "i.jsonl", [row]))
        with pytest.raises(InputError, match="row 1, tools"):
            import_items(
                store,
                "p",
                write_rows(tmp_path / "i.jsonl", [{"prompt": "q", "answers": ["a", "b"], "tools": [SCHEMA]}]),
            )


@pytest.mark.parametrize("kind", RECORDS)
def test_a_row_is_canonical_json_in_either_way_of_writing_it(kind: str) -> None:
    @settings(max_examples=100)
    @given(RECORDS[kind])
    def check_canonical_json(record: Record) -> None:
        row = json.dumps(to_content_row(record), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        assert encode_content_row(record) == row.encode()

    check_canonical_json()
