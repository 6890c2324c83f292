"""What a checker says of one answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from align.core.errors import make_printable

SHOWN = 200
"""Characters of what was found that a part keeps."""
LIMIT_S = 0.25
"""Processor time for a pattern on one answer. A pattern with nested repeats may take years."""
AllowCode = bool | Literal["unsafe"]
"""Whether programs that a model wrote may run: not at all, in a sandbox, or also where the machine has none."""


def code_permission(allow_code: bool, unsafe_code: bool) -> AllowCode:
    """Return what the two settings of a stage or of a reward allow."""
    return "unsafe" if allow_code and unsafe_code else allow_code


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a check asks of an answer.

    Attributes:
        asks: in words, such as "at least 3 sentences".
        held: whether the answer has it.
        loosely: whether the answer has it by IFEval's loose reading, without its first or last line or its asterisks.
            Of other checks the same as `held`.
        found: what was found instead, for people; may be empty.
    """

    asks: str
    held: bool
    loosely: bool
    found: str = ""


def part(asks: str, held: bool, found: str = "", loosely: bool | None = None) -> Part:
    """A part whose `found` is short, and can be written to a file."""
    shown = make_printable(found[: SHOWN + 1])
    return Part(asks, held, held if loosely is None else loosely, shown if len(shown) <= SHOWN else shown[:SHOWN] + "…")


@dataclass(frozen=True, slots=True)
class Checked:
    """What a checker says of one answer.

    Attributes:
        score: 1 where every part held, else 0.
        parts: in the order in which the check names them.
        error: why there is no verdict; empty where there is one. Such an answer scores 0 and is counted by itself.
        sandbox: the kind of sandbox that the answer ran in; empty if it is no program.
    """

    score: float
    parts: tuple[Part, ...]
    error: str = ""
    sandbox: str = ""


@dataclass(frozen=True, slots=True)
class Checker:
    """A check that was read and found valid. Calling it never raises, whatever the answer is.

    Attributes:
        kind: the kind of check, such as `exact`.
        asks: what it asks for, in words, one text a part.
        rule: the parts of an answer. It may raise: `error` of the outcome then says what.
        warnings: what a report has to say beside the scores.
        sandbox: the kind of sandbox that answers run in; empty if they are not run.
    """

    kind: str
    asks: tuple[str, ...]
    rule: Callable[[str], Iterable[Part]]
    warnings: tuple[str, ...] = ()
    sandbox: str = ""

    def __call__(self, answer: str) -> Checked:
        try:
            parts = tuple(self.rule(answer))
        except Exception as error:
            unknown = tuple(part(asks, False) for asks in self.asks)
            return Checked(0.0, unknown, make_printable(f"{type(error).__name__}: {error}"[:SHOWN]), self.sandbox)
        return Checked(float(all(each.held for each in parts)), parts, sandbox=self.sandbox)


class Accuracy(NamedTuple):
    """The four figures of IFEval (Zhou et al., "Instruction-following evaluation for large language models", 2023), as
    shares. A prompt counts where all its instructions hold, an instruction by itself.

    Attributes:
        prompts, instructions: how many each share is of.
        errors: prompts without a verdict; they count as not followed.
    """

    prompt_strict: float
    prompt_loose: float
    instruction_strict: float
    instruction_loose: float
    prompts: int
    instructions: int
    errors: int


def accuracy(checked: Sequence[Checked]) -> Accuracy:
    """Accuracy by prompt and by instruction, strict and loose.

    Raises:
        ValueError: there is nothing to take a share of.
    """
    parts = [each for row in checked for each in row.parts]
    if not parts:
        raise ValueError("no answer was checked: there is no share to give")
    return Accuracy(
        prompt_strict=sum(all(p.held for p in row.parts) for row in checked) / len(checked),
        prompt_loose=sum(all(p.loosely for p in row.parts) for row in checked) / len(checked),
        instruction_strict=sum(p.held for p in parts) / len(parts),
        instruction_loose=sum(p.loosely for p in parts) / len(parts),
        prompts=len(checked),
        instructions=len(parts),
        errors=sum(bool(row.error) for row in checked),
    )
