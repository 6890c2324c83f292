"""The list of cleaning steps of a data set: as the setting names them, made and run.

[unicode, control, {language: {keep: [en, de]}}, {length: {least: 3, by: words}}, {fn: package.module:fn}]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align.data.clean.arguments import nearest
from align.data.clean.boilerplate import Boilerplate
from align.data.clean.characters import Control, Unicode
from align.data.clean.function import Function
from align.data.clean.language import Language
from align.data.clean.length import CountTokens, Length
from align.data.clean.outcome import Drop, Noted, Outcome, Step
from align.data.clean.pii import Pii
from align.data.clean.repetition import Repetition
from align.data.clean.turns import Empty, Roles
from align.errors import InputError, require
from align.functions import load_function

__all__ = ["STEPS", "Drop", "Noted", "Outcome", "Step", "steps_of"]

STEPS: Mapping[str, Callable[..., Step]] = {
    "unicode": Unicode,
    "control": Control,
    "empty": Empty,
    "roles": Roles,
    "language": Language,
    "length": Length,
    "repetition": Repetition,
    "boilerplate": Boilerplate.of,
    "pii": Pii,
}
"""Name → what makes the step of its arguments. `fn` beside them is a function of the user's."""
FN = "fn"
COUNT_TOKENS = "count_tokens"
"""What a step is handed by the stage, and nobody writes."""


def steps_of(
    given: Sequence[Any], field: str = "stage.clean", count_tokens: CountTokens | None = None
) -> list[tuple[str, Step]]:
    """The steps that a setting names, in its order, each with its name.

    Args:
        given: names, and mappings of one name to its arguments.
        field: where the user wrote them, for errors.
        count_tokens: what `length` by tokens counts with; None where there is no model.

    Raises:
        InputError: a step or an argument that there is not, or a value that cannot be.
    """
    require(isinstance(given, list | tuple), field, given, "is no list of steps", "Write [unicode, control].")
    return [step_of(one, f"{field}[{i}]", count_tokens) for i, one in enumerate(given)]


def step_of(given: Any, field: str, count_tokens: CountTokens | None) -> tuple[str, Step]:
    """One of the steps of a setting, see `steps_of`."""
    one = given if isinstance(given, Mapping) else {given: {}} if isinstance(given, str) else {}
    require(len(one) == 1, field, given, "is no step",
            "Write its name, or its name and its arguments: {length: {least: 3, by: words}}.")  # fmt: skip
    ((name, arguments),) = one.items()
    if name == FN:
        return FN, own(arguments, f"{field}.{FN}")
    require(name != "score", field, name, "is no step of a list: rows are scored when all sources are cleaned",
            "Write stage.score.by=loss or stage.score.by=reward.")  # fmt: skip
    require(name in STEPS, field, name, "is no cleaning step",
            f"{nearest(name, [*STEPS, FN])} The steps: {', '.join([*STEPS, FN])}.")  # fmt: skip
    return name, made(STEPS[name], {} if arguments is None else arguments, f"{field}.{name}", count_tokens)


def made(maker: Callable[..., Step], arguments: Any, field: str, count_tokens: CountTokens | None) -> Step:
    """A step with its arguments, whose errors name the place of the step."""
    known = list(inspect.signature(maker).parameters)
    passed = {COUNT_TOKENS: count_tokens} if COUNT_TOKENS in known else {}
    names = [name for name in known if name not in passed]
    example = f"Write its arguments by name: {', '.join(names)}." if names else "It has no arguments: write its name."
    require(isinstance(arguments, Mapping), field, arguments, "are no arguments by name", example)
    for name, value in arguments.items():
        remedy = f"{nearest(name, names)} {example}" if names else example
        require(name in names, f"{field}.{name}", value, "there is no such argument", remedy)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return maker(**values, **passed)
    except InputError as error:
        value = list(error.value) if isinstance(error.value, tuple) else error.value
        raise InputError(f"{field}.{error.field}", value, error.problem, error.remedy) from error


def own(spec: Any, field: str) -> Function:
    """A user's function."""
    parts = spec.split(":") if isinstance(spec, str) else []
    require(len(parts) == 2 and all(parts), field, spec, "names no function", "Write {fn: package.module:name}.")
    return Function(load_function(spec, field), spec, field)
