"""Answers as JSON: where they may stand, which path broke the schema, and schemas that are refused."""

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


def checked(answer: str, schema: dict[str, Any] | None = None) -> CheckResult:
    return build_checker({"kind": "json_schema", "schema": schema or SCHEMA}, "check")(answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"items": []}', ' {"items": [{"price": 1}]}\n', '```json\n{"items": []}\n```',
        'Here:\n```\n{"items": []}\n```\nBye',
        '```python\nx = 1\n```\nand\n```JSON\n{"items": []}\n```', '```json\n{"items": []}',
        '- a list\n  ~~~json\n  {"items": []}\n  ~~~',
    ],
)  # fmt: skip
def test_answers_that_fit(answer: str):
    assert checked(answer).score == 1


def test_the_path_that_failed_is_said():
    found = checked('{"items": [{"price": 1}, {"price": "x"}]}')
    assert [part.held for part in found.parts] == [True, False]
    assert found.parts[1].found == '$.items[1].price: "x" is not of type "number"'
    assert '"items" is a required property' in checked("{}").parts[1].found
    assert checked('{"items": [{"at": "yesterday"}]}').score == 0, "formats are checked"


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
    found = checked(answer)
    assert [part.held for part in found.parts] == [False, False]
    assert found.parts[0].found
    assert not found.error


def test_a_pattern_in_a_schema_takes_linear_time():
    schema = {"type": "string", "pattern": "^(a+)+$"}
    assert checked('"' + "a" * 100_000 + '!"', schema).score == 0
    assert checked('"aaa"', schema).score == 1


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
