"""The check `code`: the answer is Python that passes unit tests.

Tests are given as statements, or in the form of HumanEval (Chen et al., "Evaluating large language models trained on
code", 2021).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from align.core.errors import InputError, require
from align.core.spec import get_integer, get_number, get_text, get_texts, require_keys
from align.reward.checkers.checked import AllowCode, Checker, Part, make_part
from align.reward.checkers.fences import find_fenced_blocks
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
"""Labels of fenced blocks that may be Python."""
REMEDY = (
    "If this machine may run programs that a model wrote, add stage.allow_code=true (tasks of an evaluation) or "
    "reward.allow_code=true (reward=check)."
)
WARNINGS = {
    "landlock": "code runs under Landlock only, because bubblewrap and user namespaces do not work here: it can see "
    "which paths exist, and can fill the disk of temporary files",
    UNSAFE: "code runs without a sandbox, with this user's files and network: limits of time and memory stop "
    "accidents, but no attack",
}
"""Warnings that reports show beside scores of code, by the kind of sandbox."""


def build(spec: Any, field: str, allow_code: AllowCode) -> Checker:
    """Build the checker that runs an answer's Python code in a sandbox and tests whether it passes unit tests.

    The check is `{kind: code, tests: ["assert f(2) == 4"]}`, or HumanEval's `{kind: code, prompt: …, test: …,
    entry_point: f}`.

    Args:
        allow_code: whether the user agreed to run programs that a model wrote.

    Raises:
        InputError: a key is wrong, the user did not agree, or this machine has no sandbox.
    """
    require(bool(allow_code), f"{field}.kind", KIND, "runs programs that a model wrote", REMEDY)
    settings = require_keys(spec, field, ("kind",), ("tests", "prompt", "test", "entry_point", "timeout", "memory_mb"))
    human_eval = "test" in settings
    require(
        human_eval != ("tests" in settings),
        f"{field}.tests",
        settings.get("tests", "(missing)"),
        "either `tests` or `test` is needed",
        'Write tests: ["assert f(2) == 4"], or HumanEval\'s prompt, test and entry_point.',
    )
    prompt = get_text(settings, field, "prompt")
    entry = get_text(settings, field, "entry_point")
    is_name = entry.isidentifier() or not entry
    require(is_name, f"{field}.entry_point", entry, "is no name in Python", "Write a function's name.")
    is_named = bool(entry) or not human_eval
    require(is_named, f"{field}.entry_point", "(missing)", "is needed", "Name the function.")
    human_eval_tests = (f"{get_text(settings, field, 'test')}\ncheck({entry})\n",)
    tests = human_eval_tests if human_eval else get_texts(settings, field, "tests")
    for i, test in enumerate(tests):
        check_compiles(test, f"{field}.test" if human_eval else f"{field}.tests[{i}]")
    limits = Limits(
        get_number(settings, field, "timeout", USUAL.seconds, 0.1, 600),
        get_integer(settings, field, "memory_mb", USUAL.memory_mb, 64),
    )
    tier = choose_tier(allow_code == "unsafe", "unsafe_code")
    asks = [f"{entry} passes its unit tests"] if human_eval else [f"passes: {shorten_test(test)}" for test in tests]

    def check_answer(answer: str) -> list[Part]:
        result = run_in_sandbox(build_program(answer, prompt, entry), tests, limits, tier)
        return [
            make_part(requirement, problem == "", result.ended if problem is None else problem)
            for requirement, problem in zip(asks, result.problems, strict=True)
        ]

    warnings = (WARNINGS[tier.name],) if tier.name in WARNINGS else ()
    return Checker(KIND, tuple(asks), check_answer, warnings, tier.name)


def run_in_sandbox(source: str, tests: Sequence[str], limits: Limits, tier: Tier) -> ProgramRun:
    """Run a program and its tests in a sandbox, and once more if the sandbox could not be set up.

    Raises:
        InputError: the sandbox could not be set up the second time either.
    """
    try:
        return run_program(source, tests, limits, tier)
    except SandboxFailed:  # for example, the machine had no memory for a process
        pass
    try:
        return run_program(source, tests, limits, tier)
    except SandboxFailed as error:
        remedy = "Free memory and processes on this machine, and run the same command again."
        raise InputError("allow_code", "true", str(error), remedy) from error


def check_compiles(test: str, field: str) -> None:
    try:
        compile(test, field, "exec")
    except (SyntaxError, ValueError) as error:
        require(False, field, test, f"is no Python ({error})", "Correct it.")


def shorten_test(test: str) -> str:
    first = test.strip().split("\n", 1)[0]
    return first if first == test.strip() and len(first) <= 80 else first[:80] + "…"


def build_program(answer: str, prompt: str = "", entry_point: str = "") -> str:
    """Return the Python program to run: the code of an answer, after HumanEval's prompt if there is one.

    With a prompt an answer is either a whole function, which replaces the prompt's, or the text that continues the
    prompt.
    """
    code = extract_code(answer, entry_point)
    if not prompt:
        return code
    if not defines(code, entry_point):
        return prompt + code
    newline = "" if prompt.endswith("\n") else "\n"
    return f"{prompt}{newline}    pass\n{code}"  # keeps the imports and helpers of the prompt; its function gets a body


def extract_code(answer: str, entry_point: str = "") -> str:
    """Return the Python code of an answer: its first fenced block that defines `entry_point`, or else its first block.

    Only blocks labelled as Python, or not labelled, count. Without such a block the whole answer is returned.
    """
    sources = [block.text for block in find_fenced_blocks(answer) if block.language in PYTHON]
    if not sources:
        return answer
    return next((source for source in sources if defines(source, entry_point)), sources[0])


def defines(code: str, name: str) -> bool:
    """Return whether Python code defines a function, a class or a variable called `name` at its top level.

    An empty name is defined nowhere.
    """
    if not name:
        return False
    return re.search(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*=", code, re.MULTILINE) is not None
