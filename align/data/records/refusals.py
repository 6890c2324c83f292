"""The error that names a field of a row, and how it shows what stands there."""

from __future__ import annotations

from typing import Any

from align.errors import InputError


def refused(where: str, column: str, value: Any, problem: str, remedy: str) -> InputError:
    """The error that names a field of a row."""
    return InputError(f"{where}, {column}", displayed(value), problem, remedy)


def displayed(value: Any) -> str:
    """A value as an error shows it, on one line: a text as it stands, where its beginning and its end can be seen."""
    plain = isinstance(value, str) and value.isprintable() and value == value.strip() != ""
    text = value if plain else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
