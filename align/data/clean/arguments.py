"""Arguments of steps, checked where a step is made. The field of an error is the argument's name; who reads the setting
puts the step's place in front of it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from align.errors import require


def check_whole(name: str, value: Any, least: int = 0) -> None:
    """Raises: InputError: `value` is neither a whole number of at least `least` nor None."""
    whole = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
    require(whole, name, value, "is no whole number" if not is_number(value) else "is out of range",
            f"Give a whole number of at least {least}.")  # fmt: skip


def check_share(name: str, value: Any) -> None:
    """Raises: InputError: `value` is neither a share of a whole nor None."""
    inside = value is None or (is_number(value) and 0 <= value <= 1)
    require(inside, name, value, "is no share", "Give a number from 0 to 1.")


def check_flag(name: str, value: Any) -> None:
    """Raises: InputError: `value` is neither true nor false."""
    require(isinstance(value, bool), name, value, "is neither true nor false", "Write true or false.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises: InputError: `value` is none of `choices`."""
    require(isinstance(value, str) and value in choices, name, value, f"is none of {', '.join(choices)}",
            nearest(value, choices))  # fmt: skip


def check_list(name: str, value: Any, choices: Collection[str], example: str, empty: bool = False) -> None:
    """Raises: InputError: `value` is no list, an empty one where that means nothing, or one of it is no choice."""
    require(isinstance(value, tuple) and (empty or bool(value)), name, value, "is no list of names",
            f"Write a list, such as {name}: {example}.")  # fmt: skip
    for one in value:
        problem = f"has {one!r}, which is none of {', '.join(sorted(choices))}"
        require(isinstance(one, str) and one in choices, name, list(value), problem, nearest(one, choices))


def nearest(given: Any, choices: Iterable[str]) -> str:
    """The remedy for a name that is none of `choices`."""
    close = difflib.get_close_matches(str(given), choices := list(choices), n=1)
    return f"Did you mean {close[0]}?" if close else f"Choose from: {', '.join(choices)}."


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
