"""From a check's description to a checker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from align.core.errors import require
from align.core.spec import get_choice, parse_json_or_text
from align.reward.checkers.checked import AllowCode, Checked, Checker

CHECK = "check"
IFEVAL = ("instruction_id_list", "kwargs")
"""Columns of a row that say what its answer has to do: ours, and those of IFEval's file."""
KINDS = {
    "instructions": "ifeval",
    "exact": "exact",
    "regex": "pattern",
    "json_schema": "json_schema",
    "code": "code",
}
"""Kind of a check → the module beside this one whose `build` makes its checkers. It is imported when it is needed."""


def load_kind(kind: str) -> ModuleType:
    return import_module(f"align.reward.checkers.{KINDS[kind]}")


def checker(spec: Any, field: str, *, allow_code: AllowCode = False) -> Checker:
    """The checker that a `check:` of a task or of a row describes.

    Args:
        spec: a mapping with a `kind`, as YAML or JSON has it.
        field: where it stands, for errors.
        allow_code: whether the kind `code` may run programs that a model wrote.

    Raises:
        InputError: names the key, its value and the remedy.
    """
    require(
        isinstance(spec, Mapping), field, spec, "is no mapping", f"Write {{kind: …}}; the kinds are {', '.join(KINDS)}."
    )
    kind = get_choice(spec, field, "kind", tuple(KINDS))
    build = load_kind(kind).build
    return build(spec, field, allow_code) if kind == "code" else build(spec, field)


def checks_of(spec: Any, turns: int | None, field: str, *, allow_code: AllowCode = False) -> tuple[Checker | None, ...]:
    """The checkers of the answers to an item: one for each turn, None for an answer that nothing is asked of.

    Args:
        spec: a list with a check for each turn, null where there is none; or one check, of the last answer.
        turns: how many there are; None where nobody knows yet.

    Raises:
        InputError: as `checker`; or the list has another length, or no check.
    """
    if not isinstance(spec, list | tuple):
        return (*[None] * ((turns or 1) - 1), checker(spec, field, allow_code=allow_code))
    remedy = "Write one check a turn, null where there is none."
    require(any(each is not None for each in spec), field, spec, "has no check", remedy)
    problem = f"has {len(spec)} checks for {turns} turns"
    require(turns in (None, len(spec)), field, spec, problem, remedy)
    return tuple(
        None if each is None else checker(each, f"{field}[{turn}]", allow_code=allow_code)
        for turn, each in enumerate(spec)
    )


def spec_of(columns: Mapping[str, Any], where: str, texts: bool = True) -> Any:
    """What a row says of its check, in its column `check` or as a row of IFEval's; None where it says nothing.

    Args:
        where: the row, for errors.
        texts: a text stands for the JSON that it writes, as in cells of tables.
    """
    check, given = columns.get(CHECK), {key: columns.get(key) for key in IFEVAL}
    if texts:
        check, given = parse_json_or_text(check), {key: parse_json_or_text(value) for key, value in given.items()}
    if check is not None:
        return check
    return None if given[IFEVAL[0]] is None else load_kind("instructions").of_row(given, where)


def check_turns(checkers: Sequence[Checker | None], answers: Sequence[str]) -> Checked:
    """What the checkers say of the answers of several turns, as one outcome: each part says of which turn it is.

    Raises:
        ValueError: there is not one answer a turn.
    """
    if len(checkers) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(checkers)} turns")
    found = [(turn, check(answers[turn])) for turn, check in enumerate(checkers) if check is not None]
    if len(answers) == 1:
        return found[0][1]
    parts = tuple(replace(part, asks=f"turn {turn + 1}: {part.asks}") for turn, one in found for part in one.parts)
    error = next((f"turn {turn + 1}: {one.error}" for turn, one in found if one.error), "")
    sandbox = next((one.sandbox for _, one in found if one.sandbox), "")
    return Checked(float(all(one.score == 1 for _, one in found)), parts, error, sandbox)
