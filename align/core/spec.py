"""Reading the mappings that describe tasks, checks and gates: each value is refused by name before anything is
generated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from align.core.errors import InputError, half_character, require


def known(spec: Any, field: str, needed: Sequence[str], optional: Sequence[str] = ()) -> Mapping[str, Any]:
    """The mapping, with every needed key and none that is unknown.

    Raises:
        InputError: as it says.
    """
    names = (*needed, *optional)
    require(
        isinstance(spec, Mapping), field, spec, "is no mapping", f"Write {{{', '.join(f'{n}: …' for n in names)}}}."
    )
    for key in spec:
        require(key in names, f"{field}.{key}", spec[key], "is not a key here", f"The keys are {', '.join(names)}.")
    for name in needed:
        require(name in spec, f"{field}.{name}", "(missing)", "is needed", f"Add {name}.")
    return spec


def text(spec: Mapping[str, Any], field: str, name: str, default: str = "") -> str:
    """A text that is not blank; `default` where the key is not there."""
    return filled(spec[name], f"{field}.{name}") if name in spec else default


def filled(value: Any, field: str) -> str:
    """A text that is not blank. Numbers are taken as written, for YAML reads `answer: 42` as a number."""
    require(not isinstance(value, bool), field, value, "is true or false, not text", "Quote it.")
    require(value == value, field, value, "is no number", "Write what is meant, or leave the row out.")
    made = str(value) if isinstance(value, int | float) else value
    require(isinstance(made, str), field, value, "is no text", "Write a text in quotes.")
    require(bool(made.strip()), field, made, "is blank", "Write the text that is meant.")
    half = half_character(made)
    require(half is None, field, made, f"has half a character ({half})", "Write the whole character.")
    return made


def texts(spec: Mapping[str, Any], field: str, name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A text or a list of them, as a tuple."""
    if name not in spec:
        return default
    given = spec[name] if isinstance(spec[name], list | tuple) else [spec[name]]
    require(bool(given), f"{field}.{name}", given, "is empty", "Write at least one text.")
    return tuple(filled(each, f"{field}.{name}[{i}]") for i, each in enumerate(given))


def flag(spec: Mapping[str, Any], field: str, name: str, default: bool) -> bool:
    given = spec.get(name, default)
    require(isinstance(given, bool), f"{field}.{name}", given, "is neither true nor false", "Write true or false.")
    return given


def number(
    spec: Mapping[str, Any], field: str, name: str, default: float | None, least: float, most: float = float("inf")
) -> float:
    """A number within bounds. Without a default it is needed."""
    given = spec.get(name, default)
    require(
        isinstance(given, int | float) and not isinstance(given, bool), f"{field}.{name}", given, "is no number",
        f"Write a number from {least:g}.",
    )  # fmt: skip
    require(
        least <= given <= most,
        f"{field}.{name}",
        given,
        "is out of bounds",
        f"Write a number from {least:g} to {most:g}.",
    )
    return given


def whole(
    spec: Mapping[str, Any],
    field: str,
    name: str,
    default: int | None = None,
    least: int = 0,
    most: float = 10**9,
) -> int:
    """A whole number within bounds; JSON may have it as 3.0."""
    given = number(spec, field, name, default, least, most)
    require(given == int(given), f"{field}.{name}", given, "is no whole number", "Write a whole number.")
    return int(given)


def one_of(spec: Mapping[str, Any], field: str, name: str, choices: Sequence[str], default: str | None = None) -> str:
    given = spec.get(name, default)
    if not isinstance(given, str) or given not in choices:
        raise InputError(f"{field}.{name}", given, "is none of the choices", f"The choices are {', '.join(choices)}.")
    return given


def listed(given: Any, field: str, help: str) -> list[tuple[str, Any]]:
    """The values of a list, each with its field. Raises: InputError: it is no list."""
    require(isinstance(given, list | tuple), field, given, "is no list", help)
    return [(f"{field}[{i}]", value) for i, value in enumerate(given)]


def written(value: Any) -> Any:
    """The value that a text writes as JSON; itself where it is none."""
    with suppress(ValueError):
        return json.loads(value) if isinstance(value, str) else value
    return value or None


def quoted(found: Sequence[str], joined_by: str = "or") -> str:
    """`"a", "b" or "c"`."""
    marked = [f'"{each}"' for each in found]
    return marked[0] if len(marked) == 1 else f"{', '.join(marked[:-1])} {joined_by} {marked[-1]}"
