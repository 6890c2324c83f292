"""Parse the mappings that describe tasks, checks and gates, with errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from align.core.errors import InputError, find_lone_surrogate, require


def require_keys(spec: Any, field: str, required: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return `spec` after checking that it is a mapping with all `required` keys and no others except `optional` ones.

    Raises:
        InputError: it is no mapping, lacks a needed key, or has an unknown one.
    """
    names = (*required, *optional)
    remedy = f"Write {{{', '.join(f'{name}: …' for name in names)}}}."
    require(isinstance(spec, Mapping), field, spec, "is no mapping", remedy)
    for key in spec:
        require(key in names, f"{field}.{key}", spec[key], "is not a key here", f"The keys are {', '.join(names)}.")
    for name in required:
        require(name in spec, f"{field}.{name}", "(missing)", "is needed", f"Add {name}.")
    return spec


def get_text(spec: Mapping[str, Any], field: str, name: str, default: str = "") -> str:
    """Return the text of the key `name`, or the default if the key is missing. Raises InputError for a blank text."""
    return parse_text(spec[name], f"{field}.{name}") if name in spec else default


def parse_text(value: Any, field: str) -> str:
    """Return a value as text, or raise InputError if it is blank or neither a text nor a number.

    A number becomes text, because YAML reads `answer: 42` as a number.
    """
    require(not isinstance(value, bool), field, value, "is true or false, not text", "Quote it.")
    require(value == value, field, value, "is no number", "Write what is meant, or leave the row out.")
    text = str(value) if isinstance(value, int | float) else value
    require(isinstance(text, str), field, value, "is no text", "Write a text in quotes.")
    require(bool(text.strip()), field, text, "is blank", "Write the text that is meant.")
    surrogate = find_lone_surrogate(text)
    require(surrogate is None, field, text, f"has half a character ({surrogate})", "Write the whole character.")
    return text


def get_texts(spec: Mapping[str, Any], field: str, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the value of the key `name`, a text or a list of texts, as a tuple, or the default if the key is missing.

    Raises InputError for an empty list and for a blank text.
    """
    if name not in spec:
        return default
    values = spec[name] if isinstance(spec[name], list | tuple) else [spec[name]]
    require(bool(values), f"{field}.{name}", values, "is empty", "Write at least one text.")
    return tuple(parse_text(value, f"{field}.{name}[{i}]") for i, value in enumerate(values))


def get_flag(spec: Mapping[str, Any], field: str, name: str, default: bool) -> bool:
    value = spec.get(name, default)
    require(isinstance(value, bool), f"{field}.{name}", value, "is neither true nor false", "Write true or false.")
    return value


def get_number(
    spec: Mapping[str, Any], field: str, name: str, default: float | None, minimum: float, maximum: float = float("inf")
) -> float:
    """Return the number of the key `name`, or raise InputError if it is not from `minimum` to `maximum`.

    Returns the default if the key is missing; without a default the key is needed.
    """
    field = f"{field}.{name}"
    value = spec.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number, field, value, "is no number", f"Write a number from {minimum:g}.")
    remedy = f"Write a number from {minimum:g} to {maximum:g}."
    require(minimum <= value <= maximum, field, value, "is out of bounds", remedy)
    return value


def get_integer(
    spec: Mapping[str, Any],
    field: str,
    name: str,
    default: int | None = None,
    minimum: int = 0,
    maximum: float = 10**9,
) -> int:
    """Return the whole number of the key `name`, or raise InputError if it is not from `minimum` to `maximum`.

    JSON may write it as 3.0. Returns the default if the key is missing; without a default the key is needed.
    """
    value = get_number(spec, field, name, default, minimum, maximum)
    require(value == int(value), f"{field}.{name}", value, "is no whole number", "Write a whole number.")
    return int(value)


def get_choice(
    spec: Mapping[str, Any], field: str, name: str, choices: Sequence[str], default: str | None = None
) -> str:
    value = spec.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{field}.{name}", value, "is none of the choices", f"The choices are {', '.join(choices)}.")
    return value


def enumerate_list(values: Any, field: str, help: str) -> list[tuple[str, Any]]:
    """Return a list's values as pairs (field, value), where the field names the position, such as `stage.gates[0]`.

    Raises:
        InputError: it is no list.
    """
    require(isinstance(values, list | tuple), field, values, "is no list", help)
    return [(f"{field}[{i}]", value) for i, value in enumerate(values)]


def parse_json_or_text(value: Any) -> Any:
    """Return the decoded value of a JSON text, any other text or value as it is, and None for an empty text."""
    with suppress(ValueError):
        return json.loads(value) if isinstance(value, str) else value
    return value or None


def join_quoted(words: Sequence[str], joined_by: str = "or") -> str:
    """Return words in quotation marks as a list in a sentence, such as `"a", "b" or "c"`."""
    quotations = [f'"{word}"' for word in words]
    if len(quotations) == 1:
        return quotations[0]
    return f"{', '.join(quotations[:-1])} {joined_by} {quotations[-1]}"
