"""The answer is JSON that fits a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.core.distribution import require_extra
from align.core.errors import InputError, require
from align.core.spec import check_keys
from align.reward.checkers.checked import SHOWN, Checker, Part, part
from align.reward.checkers.fences import blocks

KIND = "json_schema"
IS_JSON, FITS = "the answer is JSON, alone or in a fenced block", "it fits the schema"
REMEDY = "Correct it. References are to what the schema itself has, such as #/$defs/name."


def build(spec: Any, field: str) -> Checker:
    """`{kind: json_schema, schema: {type: object, required: [name]}}`.

    jsonschema_rs resolves the references of a schema when it compiles it, fetches none, and matches patterns in linear
    time. Look-around and backreferences in a schema's patterns are therefore refused.

    Raises:
        InputError: jsonschema_rs is not installed; the schema is none, or refers to something outside.
    """
    require_extra("serve", f"{field}.kind", KIND, ["jsonschema_rs"])
    import jsonschema_rs

    schema = check_keys(spec, field, ("kind", "schema"))["schema"]
    require(isinstance(schema, Mapping), f"{field}.schema", schema, "is no mapping", "Write a JSON schema.")
    try:
        validator = jsonschema_rs.validator_for(
            dict(schema), offline=True, validate_formats=True, pattern_options=jsonschema_rs.RegexOptions()
        )
    except (jsonschema_rs.ReferencingError, ValueError) as error:
        problem, shown = str(error).split("\n", 1)[0], str(schema)[:SHOWN]
        raise InputError(f"{field}.schema", shown, f"is no JSON schema ({problem})", REMEDY) from error

    def rule(answer: str) -> list[Part]:
        try:
            value = parsed(answer)
        except (ValueError, RecursionError) as error:
            return [part(IS_JSON, False, str(error)), part(FITS, False)]
        wrong = next(validator.iter_errors(value), None)
        return [part(IS_JSON, True), part(FITS, wrong is None, said(wrong) if wrong else "")]

    return Checker(KIND, (IS_JSON, FITS), rule)


def parsed(answer: str) -> Any:
    """The value of a whole answer, or else of its first block labelled json, or else of its first block.

    Raises:
        ValueError: it is not JSON. RecursionError: it is nested too deeply.
    """
    try:
        return value_of(answer)
    except (ValueError, RecursionError):
        fenced = blocks(answer)
        if not fenced:
            raise
    return value_of(next((block for block in fenced if block.language == "json"), fenced[0]).text)


def value_of(written: str) -> Any:
    return json.loads(written, parse_constant=refuse)


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def said(error: Any) -> str:
    """Where an answer breaks the schema, and how: `$.items[0].price: "x" is not of type "number"`."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.instance_path)
    return f"${path}: {error.message}"
