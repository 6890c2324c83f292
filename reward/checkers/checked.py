"""Checkers, their results, and the accuracy over many answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from align.core.errors import make_printable

SHOWN = 200
"""Maximum number of characters of `Part.found`."""
LIMIT_S = 0.25
"""Maximum seconds for a regular expression on one answer, because nested repeats may take exponential time."""
AllowCode = bool | Literal["unsafe"]
"""Permission to run programs that a model wrote: never, in a sandbox only, or without one if the machine has none."""


def combine_code_settings(allow_code: bool, unsafe_code: bool) -> AllowCode:
    """Combine two settings into a permission to run a model's programs: False, True (in a sandbox) or `unsafe`."""
    return "unsafe" if allow_code and unsafe_code else allow_code


@dataclass(frozen=True, slots=True)
class Part:
    """The result of one requirement of a check on an answer.

    Attributes:
        asks: the requirement in words, such as "at least 3 sentences".
        held: whether the answer meets it.
        loosely: whether the answer meets it in IFEval's loose reading, without its first or last line or its asterisks.
            Equal to `held` for other checks.
        found: what the answer has instead, for people; may be empty.
        compared: the normalised text that was compared with right answers, of checks of the kind `exact`. Answers with
            equal texts are the same answer. None if the answer has no such text, and for other checks.
    """

    asks: str
    held: bool
    loosely: bool
    found: str = ""
    compared: str | None = None


def make_part(asks: str, held: bool, found: str = "", loosely: bool | None = None, compared: str | None = None) -> Part:
    """Return the result of one requirement, with the excerpt `found` cut to 200 characters and its secrets masked."""
    excerpt = make_printable(found[: SHOWN + 1])
    if len(excerpt) > SHOWN:
        excerpt = excerpt[:SHOWN] + "…"
    return Part(asks, held, held if loosely is None else loosely, excerpt, compared)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check of one answer.

    Attributes:
        score: 1 if every part held, else 0.
        parts: in the order of the check's requirements.
        error: why the check could not be decided; empty if it was. Such an answer scores 0 and is counted separately.
        sandbox: the kind of sandbox that the answer ran in; empty if it is no program.
    """

    score: float
    parts: tuple[Part, ...]
    error: str = ""
    sandbox: str = ""


@dataclass(frozen=True, slots=True)
class Checker:
    """A function that checks an answer and returns a CheckResult, with a description of its requirements.

    The call never raises.

    Attributes:
        kind: the kind of check, such as `exact`.
        asks: the requirements in words, one for each part.
        rule: returns the parts of an answer. An exception of it becomes the result's `error`.
        warnings: texts that reports show beside the scores.
        sandbox: the kind of sandbox that answers run in; empty if they are not run.
    """

    kind: str
    asks: tuple[str, ...]
    rule: Callable[[str], Iterable[Part]]
    warnings: tuple[str, ...] = ()
    sandbox: str = ""

    def __call__(self, answer: str) -> CheckResult:
        try:
            parts = tuple(self.rule(answer))
        except Exception as error:
            undecided = tuple(make_part(asks, False) for asks in self.asks)
            return CheckResult(0.0, undecided, make_printable(f"{type(error).__name__}: {error}"[:SHOWN]), self.sandbox)
        return CheckResult(float(all(result.held for result in parts)), parts, sandbox=self.sandbox)


class Accuracy(NamedTuple):
    """The four accuracies of IFEval, by prompt and by instruction, strict and loose.

    Each is a share. A prompt is followed if all its instructions are. Source: Zhou et al., "Instruction-following
    evaluation for large language models", 2023.

    Attributes:
        prompts, instructions: the numbers that the shares are of.
        errors: prompts whose check could not be decided; they count as not followed.
    """

    prompt_strict: float
    prompt_loose: float
    instruction_strict: float
    instruction_loose: float
    prompts: int
    instructions: int
    errors: int


def compute_accuracy(checked: Sequence[CheckResult]) -> Accuracy:
    """Compute IFEval's accuracy by prompt and by instruction, strict and loose, over the results of all answers.

    Raises:
        ValueError: no answer was checked.
    """
    parts = [part for result in checked for part in result.parts]
    if not parts:
        raise ValueError("no answer was checked: there is no share to give")
    return Accuracy(
        prompt_strict=sum(all(part.held for part in result.parts) for result in checked) / len(checked),
        prompt_loose=sum(all(part.loosely for part in result.parts) for result in checked) / len(checked),
        instruction_strict=sum(part.held for part in parts) / len(parts),
        instruction_loose=sum(part.loosely for part in parts) / len(parts),
        prompts=len(checked),
        instructions=len(parts),
        errors=sum(bool(result.error) for result in checked),
    )
