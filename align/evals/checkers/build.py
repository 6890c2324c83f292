"""From a check's description to a checker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from align.errors import require
from align.evals.checkers import code, exact, following, json_schema, pattern
from align.evals.checkers.checked import Checked, Checker
from align.evals.spec import one_of

KINDS: dict[str, Callable[[Any, str], Checker]] = {
    following.KIND: following.build,
    exact.KIND: exact.build,
    pattern.KIND: pattern.build,
    json_schema.KIND: json_schema.build,
}


def checker(spec: Any, field: str, *, allow_code: bool = False) -> Checker:
    """The checker that a `check:` of a task or of a row describes.

    Args:
        spec: a mapping with a `kind`, as YAML or JSON has it.
        field: where it stands, for errors.
        allow_code: whether the kind `code` may run programs that a model wrote.

    Raises:
        InputError: names the key, its value and the remedy.
    """
    kinds = KINDS | {code.KIND: partial(code.build, allow_code=allow_code)}
    require(
        isinstance(spec, Mapping), field, spec, "is no mapping", f"Write {{kind: …}}; the kinds are {', '.join(kinds)}."
    )
    return kinds[one_of(spec, field, "kind", tuple(kinds))](spec, field)


def turn_checkers(specs: Any, field: str, *, allow_code: bool = False) -> tuple[Checker | None, ...]:
    """The checkers of a conversation in several turns: one for each answer of the assistant, in order; None for an
    answer that nothing is asked of.

    Raises:
        InputError: as `checker`; or no turn has a check.
    """
    listed = isinstance(specs, list | tuple) and any(each is not None for each in specs)
    require(listed, field, specs, "is no list with a check", "Write one check a turn, null where there is none.")
    return tuple(
        None if each is None else checker(each, f"{field}[{turn}]", allow_code=allow_code)
        for turn, each in enumerate(specs)
    )


def check_turns(checkers: Sequence[Checker | None], answers: Sequence[str]) -> tuple[Checked | None, ...]:
    """What each turn's checker says of its answer; None where there is no check.

    Raises:
        ValueError: there is not one answer a turn.
    """
    if len(checkers) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(checkers)} turns")
    return tuple(check and check(answer) for check, answer in zip(checkers, answers, strict=True))
