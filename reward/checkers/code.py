"""The answer is Python that passes unit tests: the tests' own text, or HumanEval's form (Chen et al., "Evaluating large
language models trained on code", 2021)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from align.core.errors import InputError, require
from align.core.spec import check_keys, get_integer, get_number, get_text, get_texts
from align.reward.checkers.checked import AllowCode, Checker, Part, part
from align.reward.checkers.fences import blocks
from align.reward.checkers.sandbox import (
    UNSAFE,
    Limits,
    ProgramRun,
    SandboxFailed,
    Tier,
    choose_tier,
    run_program,
)

KIND = "code"
USUAL = Limits()
PYTHON = ("python", "py", "python3", "")
"""Labels of a block that may be Python."""
REMEDY = (
    "If this machine may run programs that a model wrote, add stage.allow_code=true (tasks of an evaluation) or "
    "reward.allow_code=true (reward=check)."
)
WARNINGS = {
    "landlock": "code runs under Landlock alone, for bubblewrap and user namespaces do not work here: it can see which "
    "paths exist, and fill the disk that holds temporary files",
    UNSAFE: "code runs without a sandbox, with this user's files and network: limits of time and memory stop accidents "
    "and no attack",
}
"""What a report says beside scores of code, by the sandbox."""


def build(spec: Any, field: str, allow_code: AllowCode) -> Checker:
    """Return the checker of `{kind: code, tests: ["assert f(2) == 4"]}`, or of HumanEval's `{kind: code, prompt: …,
    test: …, entry_point: f}`.

    Args:
        allow_code: whether the user agreed to run programs that a model wrote.

    Raises:
        InputError: the user did not agree, or this machine has no sandbox; or names the key that is wrong.
    """
    require(bool(allow_code), f"{field}.kind", KIND, "runs programs that a model wrote", REMEDY)
    given = check_keys(spec, field, ("kind",), ("tests", "prompt", "test", "entry_point", "timeout", "memory_mb"))
    human_eval = "test" in given
    require(
        human_eval != ("tests" in given), f"{field}.tests", given.get("tests", "(missing)"),
        "either `tests` or `test` is needed",
        "Write tests: [\"assert f(2) == 4\"], or HumanEval's prompt, test and entry_point.",
    )  # fmt: skip
    prompt, entry = get_text(given, field, "prompt"), get_text(given, field, "entry_point")
    require(
        entry.isidentifier() or not entry,
        f"{field}.entry_point",
        entry,
        "is no name in Python",
        "Write a function's name.",
    )
    require(
        bool(entry) or not human_eval, f"{field}.entry_point", entry or "(missing)", "is needed", "Name the function."
    )
    tests = (f"{get_text(given, field, 'test')}\ncheck({entry})\n",) if human_eval else get_texts(given, field, "tests")
    for i, each in enumerate(tests):
        compiles(each, f"{field}.test" if human_eval else f"{field}.tests[{i}]")
    limits = Limits(
        get_number(given, field, "timeout", USUAL.seconds, 0.1, 600),
        get_integer(given, field, "memory_mb", USUAL.memory_mb, 64),
    )
    tier = choose_tier(allow_code == "unsafe", "unsafe_code")
    asks = [f"{entry} passes its unit tests"] if human_eval else [f"passes: {shortened(each)}" for each in tests]

    def rule(answer: str) -> list[Part]:
        result = run_in_sandbox(program(answer, prompt, entry), tests, limits, tier)
        return [
            part(words, problem == "", result.ended if problem is None else problem)
            for words, problem in zip(asks, result.problems, strict=True)
        ]

    warnings = (WARNINGS[tier.name],) if tier.name in WARNINGS else ()
    return Checker(KIND, tuple(asks), rule, warnings, tier.name)


def run_in_sandbox(source: str, tests: Sequence[str], limits: Limits, tier: Tier) -> ProgramRun:
    """Run a program and its tests, a second time if no sandbox could be set up.

    Raises:
        InputError: the second time failed too.
    """
    try:
        return run_program(source, tests, limits, tier)
    except SandboxFailed:  # such as a process that this machine had no memory for
        pass
    try:
        return run_program(source, tests, limits, tier)
    except SandboxFailed as error:
        remedy = "Free memory and processes on this machine, and run the same command again."
        raise InputError("allow_code", "true", str(error), remedy) from error


def compiles(test: str, field: str) -> None:
    try:
        compile(test, field, "exec")
    except (SyntaxError, ValueError) as error:
        require(False, field, test, f"is no Python ({error})", "Correct it.")


def shortened(test: str) -> str:
    first = test.strip().split("\n", 1)[0]
    return first if first == test.strip() and len(first) <= 80 else first[:80] + "…"


def program(answer: str, prompt: str = "", entry_point: str = "") -> str:
    """The program in an answer. With HumanEval's prompt an answer is either a whole function, which replaces the
    prompt's, or the text that continues it."""
    code = code_of(answer, entry_point)
    if not prompt:
        return code
    if not defines(code, entry_point):
        return prompt + code
    begun = prompt if prompt.endswith("\n") else prompt + "\n"
    return f"{begun}    pass\n{code}"  # the prompt's imports and helpers stay; its own function has no body yet


def code_of(answer: str, entry_point: str = "") -> str:
    """The first fenced block that defines the entry point, or else the first that may be Python; without a fence the
    whole answer."""
    written = [block.text for block in blocks(answer) if block.language in PYTHON]
    if not written:
        return answer
    return next((each for each in written if entry_point and defines(each, entry_point)), written[0])


def defines(code: str, name: str) -> bool:
    """Whether a program gives a name a function, a class or a value at its top level."""
    if not name:
        return False
    return re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*=", code, re.MULTILINE) is not None
