"""Answers that follow a grammar, drawn at random: harsher than a model, whose answers are likely."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.models.base import find_base
from align.models.load import load_tokenizer
from align.rollout.detokenize import TokenTexts
from align.rollout.serving_engine import Grammar
from align.serve.answer_constraints import prepare_grammars
from align.serve.errors import Refusal
from align.serve.prompts import ChatBody, ChatFormat, Prompt

PADDING = 64  # rows of the embedding that are no tokens


@pytest.fixture(scope="module")
def pocket() -> ChatFormat:
    """SentencePiece's BPE, with bytes for what it does not know."""
    tokenizer = load_tokenizer(find_base("pocket"))
    return ChatFormat(tokenizer, (tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def forms(pocket: ChatFormat, tool_tokenizer: Any) -> Sequence[ChatFormat]:
    """And byte-level BPE."""
    return pocket, ChatFormat(tool_tokenizer, (tool_tokenizer.eos_token_id,))


def body(**asked: Any) -> ChatBody:
    return ChatBody(model="m", messages=[{"role": "user", "content": "a"}], **asked)  # type: ignore[list-item]


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


def begun(form: ChatFormat, most: int, *, thinks: bool = False, **asked: Any) -> Grammar:
    rows = len(form.tokenizer) + PADDING
    start = prepare_grammars(form, body(**asked), rows)
    assert start is not None
    return start(Prompt((1,), opens_reasoning=thinks), most)


def drawn(form: ChatFormat, seed: int, most: int, **asked: Any) -> tuple[str, bool]:
    """A text that is drawn from what is allowed, each token as likely as another; and whether the grammar ended it."""
    grammar, rng, ids = begun(form, most, **asked), np.random.default_rng(seed), []
    for _ in range(most):
        ids.append(int(rng.choice(np.flatnonzero(grammar.compute_mask()))))
        if grammar.accept(ids[-1]):
            break
    else:
        return text_of(form, ids), False
    return text_of(form, ids), True


def text_of(form: ChatFormat, ids: Sequence[int]) -> str:
    said = [id for id in ids if id not in form.stop_ids]
    return form.tokenizer.decode(said, clean_up_tokenization_spaces=False)


def token(form: ChatFormat, letter: str) -> int:
    return form.grammars.vocabulary.tokens.greedy_tokenize(letter)[0]


BLANKS = ["", " ", "\n", *("\n" + " " * n for n in range(1, 17))]
LANGUAGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "choice": ({"structured_outputs": {"choice": ["a", "ab", 'ü"', "😀\n"]}}, {"a", "ab", 'ü"', "😀\n"}),
    "regex": (
        {"structured_outputs": {"regex": "(ab|é){1,3}/?"}},
        {"".join(made) + slash for n in (1, 2, 3) for made in product(["ab", "é"], repeat=n) for slash in ("", "/")},
    ),
    "constants": (of_schema({"enum": [True, "é", 12, None]}), {"true", '"é"', "12", "null"}),
    "array": (
        of_schema({"type": "array", "items": {"const": 7}, "maxItems": 1}),
        {f"[{blank}]" for blank in BLANKS} | {f"[{one}7{two}]" for one in BLANKS for two in BLANKS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_token_is_allowed_where_a_text_goes_on_with_its_bytes_and_nowhere_else(
    name: str, forms: Sequence[ChatFormat]
):
    asked, language = LANGUAGES[name]
    whole = {text.encode() for text in language}
    beginnings = {text[:n] for text in whole for n in range(len(text) + 1)}
    for form in forms:
        texts, rng, size = TokenTexts(form.tokenizer), np.random.default_rng(0), len(form.tokenizer)
        special = {*form.tokenizer.all_special_ids, *form.stop_ids}
        bytes_ = [b"" if id in special else texts.bytes_of(id) for id in range(size)]
        for _ in range(15):
            grammar, said = begun(form, 10_000, **asked), b""  # far from its end
            while True:
                allowed = grammar.compute_mask()
                assert allowed.shape == (size + PADDING,)
                may = set(np.flatnonzero(allowed).tolist())
                assert bool(may & set(form.stop_ids)) == (said in whole)
                expected = {more for more in bytes_ if more and said + more in beginnings}
                found = {bytes_[id] for id in may - set(form.stop_ids)}
                # What comes next may be forced. Then its own tokens are enough.
                forced = len({more[0] for more in expected}) == 1 and said not in whole
                assert found == expected or (forced and found and found < expected), said
                token = int(rng.choice(sorted(may)))
                said += bytes_[token]
                goes_on = any(text != said and text.startswith(said) for text in whole)
                ended = grammar.accept(token)
                assert not (ended and token not in form.stop_ids and goes_on)
                if ended:
                    assert said in whole
                    break


names = st.sampled_from(["a", "name", "größe", "a/b", "x y"])
numbers = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number"])},
    optional={"minimum": st.integers(-20, 0), "maximum": st.integers(1, 2000)},
)
strings = st.one_of(
    st.just({"type": "string"}),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 8), st.integers(0, 30),
    ),
    st.sampled_from(["^[A-Z]{2}-[0-9]{3,}$", "^(ab|c)+$", "@", "^x.*y$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
)  # fmt: skip
leaves = st.one_of(
    numbers, strings,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"$ref": "#/$defs/tree"}, {"type": "object"}]),
    st.lists(st.sampled_from(["red", 3, None, True, "ü"]), min_size=1, max_size=4, unique=True).map(
        lambda values: {"enum": values}
    ),
)  # fmt: skip


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(properties: dict[str, Any], required: int, more: bool) -> dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties)[:required],
                "additionalProperties": more}  # fmt: skip

    return st.builds(made, st.dictionaries(names, inner, max_size=4), st.integers(0, 4), st.booleans())


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(items: Any, least: int, more: int | None) -> dict[str, Any]:
        array = {"type": "array", "items": items, "minItems": least}
        return array if more is None else array | {"maxItems": least + more}

    return st.builds(made, inner, st.integers(0, 2), st.none() | st.integers(0, 3))


def either(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several})


TREE = {
    "type": "object", "required": ["left", "value"], "additionalProperties": False,
    "properties": {"value": {"type": "integer"}, "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                   "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
}  # fmt: skip
schemas = st.recursive(leaves, lambda s: objects(s) | arrays(s) | either(s), max_leaves=8).map(
    lambda schema: {**schema, "$defs": {"tree": TREE}}
)


@settings(max_examples=100, deadline=None)
@given(schemas, st.integers(0, 2**32))
def test_answers_end_within_their_tokens_and_are_valid(pocket: ChatFormat, schema: Any, seed: int):
    for i in range(2):
        text, ended = drawn(pocket, seed + i, 512, **of_schema(schema))
        assert ended, text
        jsonschema.validate(json.loads(text), schema)


PERSON = {
    "type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"},
                   "tags": {"type": "array", "items": {"type": "string"}}},
}  # fmt: skip


def test_an_answer_has_its_tokens_to_itself_until_they_run_out(forms: Sequence[ChatFormat]):
    for form in forms:
        used = [len(drawn(form, seed, 400, **of_schema({"type": "string"}))[0]) for seed in range(5)]
        assert max(used) > 300  # bytes; a string is not cut short early
        for most in (60, 90, 400):
            text, ended = drawn(form, 1, most, **of_schema(PERSON))
            assert ended
            jsonschema.validate(json.loads(text), PERSON)
        text, ended = drawn(form, 1, 5, **of_schema(PERSON))
        assert not ended  # and no answer is that short


def test_blanks_are_bounded(pocket: ChatFormat):
    grammar = begun(pocket, 10_000, **of_schema(PERSON))
    blanks = [token(pocket, blank) for blank in "\n "]
    grammar.accept(token(pocket, "{"))
    for _ in range(17):
        allowed = [id for id in blanks if grammar.compute_mask()[id]]
        if not allowed:
            break
        grammar.accept(allowed[0])
    assert not any(grammar.compute_mask()[blanks])


def test_no_key_has_two_spellings(pocket: ChatFormat):
    """`"\\u0061ge"` would pass as a key that was not declared, and be `age`."""
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    grammar = begun(pocket, 10_000, **of_schema(schema))
    for letter in '{"\\':
        grammar.accept(token(pocket, letter))
    assert grammar.compute_mask()[token(pocket, "n")]
    assert not grammar.compute_mask()[token(pocket, "u")]


def test_reasoning_is_free_and_closed_in_time(forms: Sequence[ChatFormat]):
    for form in forms:
        for seed in range(4):
            text, ended = drawn(form, seed, 300, thinks=True, **of_schema(PERSON))
            thought, closed, answer = text.partition("</think>")
            assert ended
            assert closed
            assert len(thought) > 100
            jsonschema.validate(json.loads(answer), PERSON)


RAIN = {"type": "object", "properties": {"in": {"enum": ["Oslo", "Rome"]}}, "required": ["in"],
        "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "rain", "parameters": RAIN, "strict": True}},
    {"type": "function", "function": {"name": "noon"}},
]


def test_a_forced_call_is_written_as_the_template_writes_calls(forms: Sequence[ChatFormat]):
    form = forms[1]
    seen = set()
    for seed in range(20):
        text, ended = drawn(form, seed, 200, tools=TOOLS, tool_choice="required")
        assert ended
        assert text.startswith("<tool_call>{")
        call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        seen.add(call["name"])
        if call["name"] == "rain":
            jsonschema.validate(call["arguments"], RAIN)
    assert seen == {"rain", "noon"}
    chosen = {"type": "function", "function": {"name": "rain"}}
    assert '"name": "rain"' in drawn(form, 0, 200, tools=TOOLS, tool_choice=chosen)[0]


def test_a_strict_tool_is_strict_where_calls_are_free_and_text_stays_text(forms: Sequence[ChatFormat]):
    form = forms[1]
    for said, goes_on in (
        ('Hm {"in": 3} <b>', True), ('So: <tool_call>{"name": "rain", "arguments": {"in": "Rome"}}</tool_call>', True),
        ('<tool_call>{"name": "rain", "arguments": {"in": "Paris"}}</tool_call>', False),
        ('<tool_call>{"name": "noon", "arguments": {"at": 3}}</tool_call>', True),
    ):  # fmt: skip
        grammar = begun(form, 10_000, tools=TOOLS)
        for token in form.tokenizer(said, add_special_tokens=False)["input_ids"]:
            if not grammar.compute_mask()[token]:
                assert not goes_on, said
                break
            grammar.accept(token)
        else:
            assert goes_on, said
            assert grammar.compute_mask()[form.stop_ids[0]]
    assert prepare_grammars(form, body(tools=TOOLS[1:]), 10) is None


def nested(levels: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = {
    "no type": {"type": "strin"}, "not": {"not": {"type": "string"}},
    "unique": {"type": "array", "uniqueItems": True}, "nowhere": {"$ref": "#/$defs/it"},
    "far": {"$ref": "https://example.com/it.json"}, "itself": {"$ref": "#"}, "empty": {"enum": []},
    "unsatisfiable": {"type": "integer", "minimum": 5, "maximum": 2}, "pattern": {"type": "string", "pattern": "("},
    "behind": {"type": "string", "pattern": "(?=a)b"}, "format": {"type": "string", "format": "nothing known"},
    "deep": nested(101), "deeper": nested(400), "large": {"enum": ["x" * 70_000]},
    "wide": {"properties": {f"p{i}": {} for i in range(501)}}, "fine": {"type": "integer", "multipleOf": 99_999_989},
    "fine together": {"allOf": [{"type": "integer", "multipleOf": n} for n in (31, 37, 41)]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "explodes": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(10)]},
    "twice": {"type": "object", "minProperties": 2}, "two lines": {"type": "string", "pattern": "a\nb("},
    "special": {"const": "a<|end|>b"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_its_name_at_once(name: str, pocket: ChatFormat):
    drawn(pocket, 0, 20, **of_schema({"type": "null"}))  # the trial's process runs
    began = time.process_time()
    with pytest.raises(Refusal) as refused:
        prepare_grammars(pocket, body(**of_schema(REFUSED[name])), 4096)
    assert time.process_time() - began < 0.1
    assert (refused.value.status, refused.value.param) == (400, "response_format.json_schema.schema")
    assert len(refused.value.message) < 450


def test_a_schema_that_takes_hours_is_given_up_and_others_go_on(pocket: ChatFormat):
    piled = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i % 26)}.{{{i}}}$"} for i in range(40)]}
    began = time.monotonic()
    with pytest.raises(Refusal, match="too long"):
        prepare_grammars(pocket, body(**of_schema(piled)), 4096)
    assert time.monotonic() - began < 5
    assert drawn(pocket, 0, 40, **of_schema({"const": "fine"})) == ('"fine"', True)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sun"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", **of_schema(PERSON)}, "response_format"),
        ({"structured_outputs": {"regex": "(", }}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= 'a'"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{}", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"tools": [TOOLS[1], {"function": {"name": "f", "parameters": {"type": "zz"}}}], "tool_choice": "required"},
         "tools.1.function.parameters"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_parameter(asked: Any, param: str, pocket: ChatFormat):
    with pytest.raises(Refusal) as refused:
        prepare_grammars(pocket, body(**asked), 4096)
    assert (refused.value.status, refused.value.param) == (400, param)
