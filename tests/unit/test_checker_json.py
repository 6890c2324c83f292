"""JSON answers: their places in a text, the path that broke the schema, and schemas that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from align.core.errors import InputError
from align.reward.checkers import CheckResult, build_checker

SCHEMA = {
    "type": "object",
    "required": ["items"],
    "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/item"}}},
    "$defs": {"item": {"type": "object", "properties": {"price": {"type": "number"}, "at": {"format": "date"}}}},
}


def check_json(answer: str, schema: dict[str, Any] | None = None) -> CheckResult:
    return build_checker({"kind": "json_schema", "schema": schema or SCHEMA}, "check")(answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"items": []}',
        ' {"items": [{"price": 1}]}\n',
        '```json\n{"items": []}\n```',
        'Here:\n```\n{"items": []}\n```\nBye',
        '```python\nx = 1\n```\nand\n```JSON\n{"items": []}\n```',
        '```json\n{"items": []}',
        '- a list\n  ~~~json\n  {"items": []}\n  ~~~',
    ],
)
def test_answers_that_fit(answer: str):
    assert check_json(answer).score == 1


def test_the_path_that_failed_is_said():
    result = check_json('{"items": [{"price": 1}, {"price": "x"}]}')
    assert [part.held for part in result.parts] == [True, False]
    assert result.parts[1].found == '$.items[1].price: "x" is not of type "number"'
    assert '"items" is a required property' in check_json("{}").parts[1].found
    assert check_json('{"items": [{"at": "yesterday"}]}').score == 0, "formats are checked"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{'items': []}",
        '{"items": [NaN]}',
        "[" * 100_000,
        '{"items": ' + "9" * 5000 + "}",
        "```json\n```",
        "\ud800",
        "\0",
    ],
    ids=lambda answer: ascii(answer[:12]),
)
def test_what_is_no_json(answer: str):
    result = check_json(answer)
    assert [part.held for part in result.parts] == [False, False]
    assert result.parts[0].found
    assert not result.error


def test_a_pattern_in_a_schema_takes_linear_time():
    schema = {"type": "string", "pattern": "^(a+)+$"}
    assert check_json('"' + "a" * 100_000 + '!"', schema).score == 0
    assert check_json('"aaa"', schema).score == 1


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "objekt"}, "is no JSON schema"),
        ({"minimum": "3"}, "is no JSON schema"),
        ({"$ref": "#/$defs/nowhere"}, "does not exist"),
        ({"$ref": "https://example.org/schema.json"}, "cannot fetch"),
        ({"$ref": "file:///etc/passwd"}, "cannot fetch"),
        ({"pattern": "("}, "is no JSON schema"),
        ({"pattern": "(?=a)"}, "is no JSON schema"),
        ("object", "is no mapping"),
    ],
)
def test_a_wrong_schema_is_refused_before_anything_is_generated(schema: Any, problem: str):
    with pytest.raises(InputError, match=problem) as caught:
        build_checker({"kind": "json_schema", "schema": schema}, "check")
    assert caught.value.field == "check.schema"
