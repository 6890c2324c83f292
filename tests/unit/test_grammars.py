"""Answers that follow a grammar, drawn uniformly at random: a harder test than the likely answers of a model."""

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
    """The format of a SentencePiece BPE tokenizer with byte fallback."""
    tokenizer = load_tokenizer(find_base("pocket"))
    return ChatFormat(tokenizer, (tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def forms(pocket: ChatFormat, tool_tokenizer: Any) -> Sequence[ChatFormat]:
    """The formats of the pocket tokenizer and of a byte-level BPE tokenizer."""
    return pocket, ChatFormat(tool_tokenizer, (tool_tokenizer.eos_token_id,))


def build_body(**options: Any) -> ChatBody:
    return ChatBody(model="m", messages=[{"role": "user", "content": "a"}], **options)  # type: ignore[list-item]


def build_schema_option(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


def start_grammar(form: ChatFormat, max_tokens: int, *, thinks: bool = False, **options: Any) -> Grammar:
    rows = len(form.tokenizer) + PADDING
    start = prepare_grammars(form, build_body(**options), rows)
    assert start is not None
    return start(Prompt((1,), opens_reasoning=thinks), max_tokens)


def draw_text(form: ChatFormat, seed: int, max_tokens: int, **options: Any) -> tuple[str, bool]:
    """Draw a text uniformly from the allowed tokens. Returns it, and whether the grammar ended it."""
    grammar = start_grammar(form, max_tokens, **options)
    rng = np.random.default_rng(seed)
    ids = []
    for _ in range(max_tokens):
        ids.append(int(rng.choice(np.flatnonzero(grammar.compute_mask()))))
        if grammar.accept(ids[-1]):
            break
    else:
        return decode_text(form, ids), False
    return decode_text(form, ids), True


def decode_text(form: ChatFormat, ids: Sequence[int]) -> str:
    text_ids = [id for id in ids if id not in form.stop_ids]
    return form.tokenizer.decode(text_ids, clean_up_tokenization_spaces=False)


def find_token(form: ChatFormat, letter: str) -> int:
    return form.grammars.vocabulary.tokens.greedy_tokenize(letter)[0]


BLANKS = ["", " ", "\n", *("\n" + " " * n for n in range(1, 17))]
LANGUAGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "choice": ({"structured_outputs": {"choice": ["a", "ab", 'ü"', "😀\n"]}}, {"a", "ab", 'ü"', "😀\n"}),
    "regex": (
        {"structured_outputs": {"regex": "(ab|é){1,3}/?"}},
        {"".join(parts) + slash for n in (1, 2, 3) for parts in product(["ab", "é"], repeat=n) for slash in ("", "/")},
    ),
    "constants": (build_schema_option({"enum": [True, "é", 12, None]}), {"true", '"é"', "12", "null"}),
    "array": (
        build_schema_option({"type": "array", "items": {"const": 7}, "maxItems": 1}),
        {f"[{blank}]" for blank in BLANKS} | {f"[{before}7{after}]" for before in BLANKS for after in BLANKS},
    ),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_token_is_allowed_where_a_text_goes_on_with_its_bytes_and_nowhere_else(
    name: str, forms: Sequence[ChatFormat]
):
    options, language = LANGUAGES[name]
    encoded_texts = {text.encode() for text in language}
    beginnings = {text[:n] for text in encoded_texts for n in range(len(text) + 1)}
    for form in forms:
        texts = TokenTexts(form.tokenizer)
        rng = np.random.default_rng(0)
        size = len(form.tokenizer)
        special = {*form.tokenizer.all_special_ids, *form.stop_ids}
        bytes_ = [b"" if id in special else texts.bytes_of(id) for id in range(size)]
        for _ in range(15):
            grammar = start_grammar(form, 10_000, **options)  # far from its end
            prefix = b""
            while True:
                allowed = grammar.compute_mask()
                assert allowed.shape == (size + PADDING,)
                allowed_ids = set(np.flatnonzero(allowed).tolist())
                assert bool(allowed_ids & set(form.stop_ids)) == (prefix in encoded_texts)
                expected = {token_bytes for token_bytes in bytes_ if token_bytes and prefix + token_bytes in beginnings}
                allowed_bytes = {bytes_[id] for id in allowed_ids - set(form.stop_ids)}
                # If the next byte is forced, some of its tokens are enough.
                forced = len({token_bytes[0] for token_bytes in expected}) == 1 and prefix not in encoded_texts
                assert allowed_bytes == expected or (forced and allowed_bytes and allowed_bytes < expected), prefix
                token = int(rng.choice(sorted(allowed_ids)))
                prefix += bytes_[token]
                can_continue = any(text != prefix and text.startswith(prefix) for text in encoded_texts)
                finished = grammar.accept(token)
                assert not (finished and token not in form.stop_ids and can_continue)
                if finished:
                    assert prefix in encoded_texts
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
        st.integers(0, 8),
        st.integers(0, 30),
    ),
    st.sampled_from(["^[A-Z]{2}-[0-9]{3,}$", "^(ab|c)+$", "@", "^x.*y$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
)
leaves = st.one_of(
    numbers,
    strings,
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"$ref": "#/$defs/tree"}, {"type": "object"}]),
    st.lists(st.sampled_from(["red", 3, None, True, "ü"]), min_size=1, max_size=4, unique=True).map(
        lambda values: {"enum": values}
    ),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build_object(properties: dict[str, Any], required: int, allows_more: bool) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:required],
            "additionalProperties": allows_more,
        }

    return st.builds(build_object, st.dictionaries(names, inner, max_size=4), st.integers(0, 4), st.booleans())


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build_array(items: Any, least: int, more: int | None) -> dict[str, Any]:
        array = {"type": "array", "items": items, "minItems": least}
        return array if more is None else array | {"maxItems": least + more}

    return st.builds(build_array, inner, st.integers(0, 2), st.none() | st.integers(0, 3))


def either(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several})


TREE = {
    "type": "object",
    "required": ["left", "value"],
    "additionalProperties": False,
    "properties": {
        "value": {"type": "integer"},
        "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
    },
}
schemas = st.recursive(leaves, lambda s: objects(s) | arrays(s) | either(s), max_leaves=8).map(
    lambda schema: {**schema, "$defs": {"tree": TREE}}
)


@settings(max_examples=100)
@given(schemas, st.integers(0, 2**32))
def test_answers_end_within_their_tokens_and_are_valid(pocket: ChatFormat, schema: Any, seed: int):
    for i in range(2):
        text, finished = draw_text(pocket, seed + i, 512, **build_schema_option(schema))
        assert finished, text
        jsonschema.validate(json.loads(text), schema)


PERSON = {
    "type": "object",
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
}


def test_an_answer_has_its_tokens_to_itself_until_they_run_out(forms: Sequence[ChatFormat]):
    for form in forms:
        used = [len(draw_text(form, seed, 400, **build_schema_option({"type": "string"}))[0]) for seed in range(5)]
        assert max(used) > 300  # bytes; a string is not cut short early
        for max_tokens in (60, 90, 400):
            text, finished = draw_text(form, 1, max_tokens, **build_schema_option(PERSON))
            assert finished
            jsonschema.validate(json.loads(text), PERSON)
        text, finished = draw_text(form, 1, 5, **build_schema_option(PERSON))
        assert not finished  # no valid answer is that short


def test_blanks_are_bounded(pocket: ChatFormat):
    grammar = start_grammar(pocket, 10_000, **build_schema_option(PERSON))
    blanks = [find_token(pocket, blank) for blank in "\n "]
    grammar.accept(find_token(pocket, "{"))
    for _ in range(17):
        allowed = [id for id in blanks if grammar.compute_mask()[id]]
        if not allowed:
            break
        grammar.accept(allowed[0])
    assert not any(grammar.compute_mask()[blanks])


def test_no_key_has_two_spellings(pocket: ChatFormat):
    """The key `"\\u0061ge"` would pass as an undeclared key, and be parsed as `age`."""
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    grammar = start_grammar(pocket, 10_000, **build_schema_option(schema))
    for letter in '{"\\':
        grammar.accept(find_token(pocket, letter))
    assert grammar.compute_mask()[find_token(pocket, "n")]
    assert not grammar.compute_mask()[find_token(pocket, "u")]


def test_reasoning_is_free_and_closed_in_time(forms: Sequence[ChatFormat]):
    for form in forms:
        for seed in range(4):
            text, finished = draw_text(form, seed, 300, thinks=True, **build_schema_option(PERSON))
            thought, closed, answer = text.partition("</think>")
            assert finished
            assert closed
            assert len(thought) > 100
            jsonschema.validate(json.loads(answer), PERSON)


RAIN = {
    "type": "object",
    "properties": {"in": {"enum": ["Oslo", "Rome"]}},
    "required": ["in"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "rain", "parameters": RAIN, "strict": True}},
    {"type": "function", "function": {"name": "noon"}},
]


def test_a_forced_call_is_written_as_the_template_writes_calls(forms: Sequence[ChatFormat]):
    form = forms[1]
    called_names = set()
    for seed in range(20):
        text, finished = draw_text(form, seed, 200, tools=TOOLS, tool_choice="required")
        assert finished
        assert text.startswith("<tool_call>{")
        call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        called_names.add(call["name"])
        if call["name"] == "rain":
            jsonschema.validate(call["arguments"], RAIN)
    assert called_names == {"rain", "noon"}
    tool_choice = {"type": "function", "function": {"name": "rain"}}
    assert '"name": "rain"' in draw_text(form, 0, 200, tools=TOOLS, tool_choice=tool_choice)[0]


def test_a_strict_tool_is_strict_where_calls_are_free_and_text_stays_text(forms: Sequence[ChatFormat]):
    form = forms[1]
    for text, is_allowed in (
        ('Hm {"in": 3} <b>', True),
        ('So: <tool_call>{"name": "rain", "arguments": {"in": "Rome"}}</tool_call>', True),
        ('<tool_call>{"name": "rain", "arguments": {"in": "Paris"}}</tool_call>', False),
        ('<tool_call>{"name": "noon", "arguments": {"at": 3}}</tool_call>', True),
    ):
        grammar = start_grammar(form, 10_000, tools=TOOLS)
        for token in form.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if not grammar.compute_mask()[token]:
                assert not is_allowed, text
                break
            grammar.accept(token)
        else:
            assert is_allowed, text
            assert grammar.compute_mask()[form.stop_ids[0]]
    assert prepare_grammars(form, build_body(tools=TOOLS[1:]), 10) is None


def build_nested_schema(levels: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = {
    "no type": {"type": "strin"},
    "not": {"not": {"type": "string"}},
    "unique": {"type": "array", "uniqueItems": True},
    "nowhere": {"$ref": "#/$defs/it"},
    "far": {"$ref": "https://example.com/it.json"},
    "itself": {"$ref": "#"},
    "empty": {"enum": []},
    "unsatisfiable": {"type": "integer", "minimum": 5, "maximum": 2},
    "pattern": {"type": "string", "pattern": "("},
    "behind": {"type": "string", "pattern": "(?=a)b"},
    "format": {"type": "string", "format": "nothing known"},
    "deep": build_nested_schema(101),
    "deeper": build_nested_schema(400),
    "large": {"enum": ["x" * 70_000]},
    "wide": {"properties": {f"p{i}": {} for i in range(501)}},
    "fine": {"type": "integer", "multipleOf": 99_999_989},
    "fine together": {"allOf": [{"type": "integer", "multipleOf": n} for n in (31, 37, 41)]},
    "one of": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "explodes": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(4)]} for i in range(10)]},
    "twice": {"type": "object", "minProperties": 2},
    "two lines": {"type": "string", "pattern": "a\nb("},
    "special": {"const": "a<|end|>b"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_its_name_at_once(name: str, pocket: ChatFormat):
    draw_text(pocket, 0, 20, **build_schema_option({"type": "null"}))  # starts the sandbox's process
    began = time.process_time()
    with pytest.raises(Refusal) as refused:
        prepare_grammars(pocket, build_body(**build_schema_option(REFUSED[name])), 4096)
    assert time.process_time() - began < 0.1
    assert (refused.value.status, refused.value.param) == (400, "response_format.json_schema.schema")
    assert len(refused.value.message) < 450


def test_a_schema_that_takes_hours_is_given_up_and_others_go_on(pocket: ChatFormat):
    piled = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i % 26)}.{{{i}}}$"} for i in range(40)]}
    began = time.monotonic()
    with pytest.raises(Refusal, match="too long"):
        prepare_grammars(pocket, build_body(**build_schema_option(piled)), 4096)
    assert time.monotonic() - began < 5
    assert draw_text(pocket, 0, 40, **build_schema_option({"const": "fine"})) == ('"fine"', True)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sun"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", **build_schema_option(PERSON)}, "response_format"),
        (
            {
                "structured_outputs": {
                    "regex": "(",
                }
            },
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {"grammar": "root ::= 'a'"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "{}", "choice": ["a"]}}, "structured_outputs.choice"),
        (
            {"tools": [TOOLS[1], {"function": {"name": "f", "parameters": {"type": "zz"}}}], "tool_choice": "required"},
            "tools.1.function.parameters",
        ),
    ],
)
def test_a_refusal_names_the_parameter(asked: Any, param: str, pocket: ChatFormat):
    with pytest.raises(Refusal) as refused:
        prepare_grammars(pocket, build_body(**asked), 4096)
    assert (refused.value.status, refused.value.param) == (400, param)
