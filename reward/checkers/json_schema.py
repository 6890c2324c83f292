"""The check `json_schema`: the answer is JSON that fits a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.core.distribution import require_extra
from align.core.errors import InputError, require
from align.core.spec import require_keys
from align.reward.checkers.checked import SHOWN, Checker, Part, make_part
from align.reward.checkers.fences import find_fenced_blocks

KIND = "json_schema"
IS_JSON = "the answer is JSON, alone or in a fenced block"
FITS = "it fits the schema"
REMEDY = "Correct it. References are to what the schema itself has, such as #/$defs/name."


def build(spec: Any, field: str) -> Checker:
    """Build the checker that tests whether an answer is JSON, alone or in a fenced block, and fits a schema.

    The check is `{kind: json_schema, schema: {type: object, required: [name]}}`. jsonschema_rs resolves the references
    of a schema when it compiles it, fetches none, and matches patterns in linear time. Look-around and backreferences
    in a schema's patterns are therefore refused.

    Raises:
        InputError: jsonschema_rs is not installed, or the schema is invalid or refers to something outside of itself.
    """
    require_extra("serve", f"{field}.kind", KIND, ["jsonschema_rs"])
    import jsonschema_rs

    schema = require_keys(spec, field, ("kind", "schema"))["schema"]
    require(isinstance(schema, Mapping), f"{field}.schema", schema, "is no mapping", "Write a JSON schema.")
    try:
        validator = jsonschema_rs.validator_for(
            dict(schema), offline=True, validate_formats=True, pattern_options=jsonschema_rs.RegexOptions()
        )
    except (jsonschema_rs.ReferencingError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        problem = f"is no JSON schema ({first_line})"
        raise InputError(f"{field}.schema", str(schema)[:SHOWN], problem, REMEDY) from error

    def check_answer(answer: str) -> list[Part]:
        try:
            value = parse_answer(answer)
        except (ValueError, RecursionError) as error:
            return [make_part(IS_JSON, False, str(error)), make_part(FITS, False)]
        error = next(validator.iter_errors(value), None)
        return [make_part(IS_JSON, True), make_part(FITS, error is None, describe_violation(error) if error else "")]

    return Checker(KIND, (IS_JSON, FITS), check_answer)


def parse_answer(answer: str) -> Any:
    """Parse an answer as JSON and return its value: the whole text, or else its first fenced block labelled `json`.

    If no block is labelled `json`, the first block is parsed.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    try:
        return parse_json(answer)
    except (ValueError, RecursionError):
        fenced = find_fenced_blocks(answer)
        if not fenced:
            raise
    return parse_json(next((block for block in fenced if block.language == "json"), fenced[0]).text)


def parse_json(text: str) -> Any:
    return json.loads(text, parse_constant=refuse_constant)


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def describe_violation(error: Any) -> str:
    """Format a schema violation as its path and problem, such as `$.items[0].price: "x" is not of type "number"`."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.instance_path)
    return f"${path}: {error.message}"
