"""Build checkers from the descriptions of checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from align.core.errors import require
from align.core.spec import get_choice, parse_json_or_text
from align.reward.checkers.checked import AllowCode, Checker, CheckResult

CHECK = "check"
IFEVAL = ("instruction_id_list", "kwargs")
"""Columns of IFEval's file that describe the check of a row."""
KINDS = {
    "instructions": "ifeval",
    "exact": "exact",
    "regex": "pattern",
    "json_schema": "json_schema",
    "code": "code",
}
"""Kind of a check → name of the module beside this one whose `build` returns its checker, imported on first use."""


def load_kind(kind: str) -> ModuleType:
    return import_module(f"align.reward.checkers.{KINDS[kind]}")


def build_checker(spec: Any, field: str, *, allow_code: AllowCode = False) -> Checker:
    """Build the checker that a `check` mapping describes, such as `{kind: exact, answer: "4"}`.

    Args:
        spec: a mapping with a `kind`, parsed from YAML or JSON, of a task or of a data set row.
        field: the name of the check, for errors.
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


def build_checkers(
    spec: Any, turns: int | None, field: str, *, allow_code: AllowCode = False
) -> tuple[Checker | None, ...]:
    """Build the checkers of an item's answers, one for each assistant turn, with None for turns without a check.

    Args:
        spec: a list with a check or null for each turn; or one check, of the last answer.
        turns: the number of turns; None if it is not known.

    Raises:
        InputError: as `build_checker`; or the list has another length, or no check.
    """
    if not isinstance(spec, list | tuple):
        return (*[None] * ((turns or 1) - 1), build_checker(spec, field, allow_code=allow_code))
    remedy = "Write one check for each turn, and null for a turn without a check."
    require(any(check is not None for check in spec), field, spec, "has no check", remedy)
    problem = f"has {len(spec)} checks for {turns} turns"
    require(turns in (None, len(spec)), field, spec, problem, remedy)
    return tuple(
        None if check is None else build_checker(check, f"{field}[{turn}]", allow_code=allow_code)
        for turn, check in enumerate(spec)
    )


def get_check_spec(columns: Mapping[str, Any], where: str, parse_json_texts: bool = True) -> Any:
    """Return the check that a data set row describes in its column `check` or in IFEval's columns, or None.

    Args:
        where: the name of the row, for errors.
        parse_json_texts: whether to parse texts as JSON, which cells of tables hold.
    """
    values = {key: columns.get(key) for key in (CHECK, *IFEVAL)}
    if parse_json_texts:
        values = {key: parse_json_or_text(value) for key, value in values.items()}
    if values[CHECK] is not None:
        return values[CHECK]
    return None if values[IFEVAL[0]] is None else load_kind("instructions").parse_ifeval_row(values, where)


def check_answers_of_turns(checkers: Sequence[Checker | None], answers: Sequence[str]) -> CheckResult:
    """Check each turn's answer by its checker, and return one result with score 1 if all turns pass, else 0.

    Each part of the result names its turn, unless there is only one. Turns without a checker are left out.

    Raises:
        ValueError: there is not one answer for each turn.
    """
    if len(checkers) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(checkers)} turns")
    results = {turn: check(answers[turn - 1]) for turn, check in enumerate(checkers, start=1) if check is not None}
    if len(answers) == 1:
        return results[1]
    parts = tuple(
        replace(part, asks=f"turn {turn}: {part.asks}") for turn, result in results.items() for part in result.parts
    )
    error = next((f"turn {turn}: {result.error}" for turn, result in results.items() if result.error), "")
    sandbox = next((result.sandbox for result in results.values() if result.sandbox), "")
    return CheckResult(float(all(result.score == 1 for result in results.values())), parts, error, sandbox)
