"""Further arguments of `vllm serve`, as a mapping of the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.errors import require

ARGUMENT = re.compile(r"[a-z][a-z0-9_-]*")


def check_args(field: str, given: Any, decided: Mapping[str, str]) -> None:
    """
    Args:
        field: the setting that has them.
        decided: arguments that are not for it → what decides them.

    Raises:
        InputError: it is no mapping, or an argument is none or is decided elsewhere.
    """
    problem, remedy = "is no mapping", f"Write for example {field}={{enforce-eager: true}}."
    require(given is None or isinstance(given, dict), field, given, problem, remedy)
    for name, value in (given or {}).items():
        key, known = f"{field}.{name}", decided.get(str(name).replace("_", "-").removeprefix("no-"))
        require(known is None, key, value, f"is decided by {known}", "Leave it out.")
        plain = ARGUMENT.fullmatch(str(name)) is not None and isinstance(value, str | int | float)
        require(plain, key, value, "is no argument of a command", "Give a name without dashes before it, and text.")


def words_of(given: Mapping[str, Any] | None) -> list[str]:
    """The arguments, as a command line has them."""
    said = []
    for name, value in (given or {}).items():
        dashed = str(name).replace("_", "-")
        said.append(f"--{'' if value else 'no-'}{dashed}" if isinstance(value, bool) else f"--{dashed}={value}")
    return said
