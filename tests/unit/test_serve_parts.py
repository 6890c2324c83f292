"""Answers in their parts: reasoning, text, calls of tools; however the text is cut on its way."""

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


def parts(text: str, cuts: list[int] = [], **more: Any) -> list[tuple[str, str]]:  # noqa: B006
    """Each part's kind and text, of a call its name and arguments."""
    answer = AnswerParser(**more)
    found = []
    at = 0
    for cut in sorted(min(cut, len(text)) for cut in cuts):
        found += answer.feed(text[at:cut])
        at = cut
    found += answer.feed(text[at:], last=True)
    bare = [
        AnswerPart(kind, f"{call.name}{call.arguments}") if call else AnswerPart(kind, said)
        for kind, said, call in found
    ]
    return [(part.kind, part.text) for part in (bare if "call" in {p.kind for p in bare} else join_parts(bare))]


def merged(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, text) for kind, text, _ in join_parts([AnswerPart(*each) for each in found if each[0] != "call"])]


@settings(max_examples=600, deadline=None)
@example(text="<think> a</think> b", cuts=[7], opened=False, tools=False)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60)), opened=st.booleans(), tools=st.booleans())
def test_where_the_text_is_cut_does_not_matter(text: str, cuts: list[int], opened: bool, tools: bool):
    more = {"opened": opened, "tools": ["f"] if tools else []}
    cut = parts(text, cuts, **more)
    whole = parts(text, **more)
    assert merged(cut) == merged(whole)
    assert [each for each in cut if each[0] == "call"] == [each for each in whole if each[0] == "call"]


@settings(max_examples=600, deadline=None)
@given(text=TEXTS, opened=st.booleans())
def test_reasoning_is_parted_as_in_training(text: str, opened: bool):
    reasoning, answer = split_reasoning(text, opened)
    found = parts(text, opened=opened)
    said = {kind: "".join(t for k, t in found if k == kind) for kind in ("reasoning", "content")}
    assert said["reasoning"].replace(OPEN, "").strip() == reasoning
    assert said["content"] == answer


def test_calls_between_marks_and_what_is_said_around_them():
    text = f"<think>\nhm\n</think>\n\nLet me look.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>"
    assert parts(text, [3, 20, 40, 50, 90], tools=["f"]) == [
        ("reasoning", "hm"),
        ("content", "Let me look."),
        ("call", 'f{"a": 1}'),
        ("call", 'f{"a": 1}'),
    ]
    assert [kind for kind, _ in parts(text, tools=["f"], most_calls=1)] == ["reasoning", "content", "call"]


def test_an_answer_that_is_json_is_a_call_where_its_tool_was_offered():
    assert parts('{"name": "f", "parameters": {"x": "é"}}', tools=["f"]) == [("call", 'f{"x": "é"}')]
    assert parts('[{"name": "f", "arguments": "{}"}, {"name": "g"}]', tools=["f", "g"]) == [
        ("call", "f{}"),
        ("call", "g{}"),
    ]
    for text in (CALL.replace('"f"', '"g"'), '{"a": 1}', "[1, 2]", "{ not JSON", "[" * 5000):
        assert parts(text, tools=["f"]) == [("content", text)]
    assert parts(CALL) == [("content", CALL)]


def test_a_call_that_is_none_is_text():
    for text in ("<tool_call>\nnot JSON\n</tool_call>", f"<tool_call>{CALL[:-1]}", "a <tool_call>"):
        assert "".join(said for _, said in parts(text, [5], tools=["f"])) == text.replace("a <", "a<")


def test_the_id_and_the_shape_of_a_call():
    (part,) = AnswerParser(tools=["f"]).feed(CALL, last=True)
    assert part.call is not None
    made = part.call.as_dict()
    assert json.loads(made["function"]["arguments"]) == {"a": 1}
    assert made["type"] == "function"
    assert made["id"].startswith("call_")
    assert len(made["id"]) > 20
