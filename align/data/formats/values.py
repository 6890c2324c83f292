"""JSON as rows may hold it: no key twice, no half character, no NUL, not too deep."""

from __future__ import annotations

import json
import re
from typing import Any

from align.errors import InputError, half_character

DEEPEST = 64
"""Lists and objects within one another: what reads a row walks them by recursion."""
LONGEST = 32 * 2**20
"""Bytes of a row of text; reading one takes up to some twenty times that."""
SUSPECT = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
"""What a file in UTF-8 writes half a character and NUL with; half of those that it finds have their other half."""
ONE = "Write one JSON object a line."
TOO_DEEP = "it is nested too deeply to be read"
TOO_LONG = f"a line of more than {LONGEST // 2**20} MiB"
DIVIDE = "Leave it out, or divide it into several rows."


class KeyTwice(ValueError):
    """An object has two values of one name."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises: KeyTwice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyTwice(next(name for name in names if names.count(name) > 1))
    return made


READ = json.JSONDecoder(object_pairs_hook=once)
"""Made once: `json.loads` with a hook makes a decoder a call, which takes as long as reading a short row."""
READ_TWICE = json.JSONDecoder()
"""The same for an object that has a key twice: it finds the end."""


def key_twice(where: str, name: str) -> InputError:
    return InputError(f"{where}, {name}", "(twice)", "a key of this name stands twice in one object", "Keep one.")


def check_row_of(text: str, data: dict[str, Any], where: str) -> None:
    """Raises: InputError: a row has a value that cannot be kept. Looks closer only where its text gives cause."""
    suspect = "\\u" in text and SUSPECT.search(text)
    if suspect or text.count("[") + text.count("{") > DEEPEST:
        check_values(data, where)


def check_values(value: Any, where: str, field: str = "", depth: int = 0) -> None:
    """Raises where a value of a row, or a value within one, is nested too deeply, or holds half a character or NUL."""
    named = f"{where}, {field}" if field else where
    if isinstance(value, str):
        if half := half_character(value):
            raise InputError(named, value[:60], f"it holds {half}, half a character", "Take it out.")
        if "\0" in value:
            shown = value[:60].replace("\0", "␀")
            raise InputError(named, shown, "it holds U+0000 (NUL), which is no character of a text", "Take it out.")
    if depth > DEEPEST:
        raise InputError(named.partition("[")[0], "[…]", TOO_DEEP, "Give it flat.")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_values(key, named, "a key")
            check_values(inner, where, f"{field}.{key}" if field else key, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_values(inner, where, f"{field}[{i}]", depth + 1)
