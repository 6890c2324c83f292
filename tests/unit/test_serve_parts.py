"""Parsing answers into reasoning, text and tool calls, independent of the chunks in which they arrive."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from align.data.chat.reasoning import OPEN, split_reasoning
from align.serve.answers import AnswerParser, AnswerPart, join_parts

CALL = '{"name": "f", "arguments": {"a": 1}}'
PIECES = (OPEN, "</think>", "<tool_call>", "</tool_call>", CALL, '[{"name":"f"}]', " ", "\n", "a", "<", "{", "😀")
TEXTS = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


def parse_parts(text: str, cuts: list[int] = [], **more: Any) -> list[tuple[str, str]]:  # noqa: B006
    """Return each part's kind and text. The text of a call is its name and arguments."""
    answer = AnswerParser(**more)
    answer_parts = []
    at = 0
    for cut in sorted(min(cut, len(text)) for cut in cuts):
        answer_parts += answer.feed(text[at:cut])
        at = cut
    answer_parts += answer.feed(text[at:], is_last=True)
    flat_parts = [
        AnswerPart(kind, f"{call.name}{call.arguments}") if call else AnswerPart(kind, text_part)
        for kind, text_part, call in answer_parts
    ]
    return [
        (part.kind, part.text)
        for part in (flat_parts if "call" in {p.kind for p in flat_parts} else join_parts(flat_parts))
    ]


def merge_text_parts(text_parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (kind, text) for kind, text, _ in join_parts([AnswerPart(*each) for each in text_parts if each[0] != "call"])
    ]


@settings(max_examples=600)
@example(text="<think> a</think> b", cuts=[7], opened=False, tools=False)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60)), opened=st.booleans(), tools=st.booleans())
def test_where_the_text_is_cut_does_not_matter(text: str, cuts: list[int], opened: bool, tools: bool):
    options = {"begins_in_reasoning": opened, "tools": ["f"] if tools else []}
    cut_parts = parse_parts(text, cuts, **options)
    whole_parts = parse_parts(text, **options)
    assert merge_text_parts(cut_parts) == merge_text_parts(whole_parts)
    assert [each for each in cut_parts if each[0] == "call"] == [each for each in whole_parts if each[0] == "call"]


@settings(max_examples=600)
@given(text=TEXTS, opened=st.booleans())
def test_reasoning_is_parted_as_in_training(text: str, opened: bool):
    reasoning, answer = split_reasoning(text, opened)
    answer_parts = parse_parts(text, begins_in_reasoning=opened)
    texts = {kind: "".join(t for k, t in answer_parts if k == kind) for kind in ("reasoning", "content")}
    assert texts["reasoning"].replace(OPEN, "").strip() == reasoning
    assert texts["content"] == answer


def test_calls_between_marks_and_what_is_said_around_them():
    text = f"<think>\nhm\n</think>\n\nLet me look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>"
    assert parse_parts(text, [3, 20, 40, 50, 90], tools=["f"]) == [
        ("reasoning", "hm"),
        ("content", "Let me look."),
        ("call", 'f{"a": 1}'),
        ("call", 'f{"a": 1}'),
    ]
    assert [kind for kind, _ in parse_parts(text, tools=["f"], max_calls=1)] == ["reasoning", "content", "call"]


def test_an_answer_that_is_json_is_a_call_where_its_tool_was_offered():
    assert parse_parts('{"name": "f", "parameters": {"x": "é"}}', tools=["f"]) == [("call", 'f{"x": "é"}')]
    assert parse_parts('[{"name": "f", "arguments": "{}"}, {"name": "g"}]', tools=["f", "g"]) == [
        ("call", "f{}"),
        ("call", "g{}"),
    ]
    for text in (CALL.replace('"f"', '"g"'), '{"a": 1}', "[1, 2]", "{ not JSON", "[" * 5000):
        assert parse_parts(text, tools=["f"]) == [("content", text)]
    assert parse_parts(CALL) == [("content", CALL)]


def test_a_call_that_is_none_is_text():
    for text in ("<tool_call>\nnot JSON\n</tool_call>", f"<tool_call>{CALL[:-1]}", "a <tool_call>"):
        assert "".join(part_text for _, part_text in parse_parts(text, [5], tools=["f"])) == text.replace("a <", "a<")


def test_the_id_and_the_shape_of_a_call():
    (part,) = AnswerParser(tools=["f"]).feed(CALL, is_last=True)
    assert part.call is not None
    call = part.call.as_dict()
    assert json.loads(call["function"]["arguments"]) == {"a": 1}
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert len(call["id"]) > 20
