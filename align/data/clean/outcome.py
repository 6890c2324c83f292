"""Outcomes of cleaning steps, the texts of a record that steps read, and checks of the arguments of steps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from align.core.errors import require
from align.core.types import Conversation, Document, Feedback, Preference, Record
from align.data.read.content import join_answer, list_texts, list_turns, map_texts


@dataclass(frozen=True, slots=True)
class Drop:
    """Result of a cleaning step that leaves a record out, with the reason.

    Attributes:
        reason: fixed text by which dropped records are counted: `language: de`, `repetition: lines`.
        detail: the finding in this record, shown with the example.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class NotedRecord:
    """Result of a cleaning step that keeps a record and notes findings to count, such as its language.

    Attributes:
        record: the record after the step; the same object if the step changes nothing.
        notes: fixed texts, each counted once per record: a language, a kind of personal data.
    """

    record: Record
    notes: tuple[str, ...]


Outcome = Record | Drop | NotedRecord
Step = Callable[[Record], Outcome]
"""A cleaning step, a pure and idempotent function that returns the same record object if it changes nothing."""


def join_texts(record: Record) -> str:
    """Return all texts of a record joined by line ends, so that a step can quickly tell whether the record concerns
    it."""
    return record if isinstance(record, str) else "\n".join(list_texts(record))


def join_spoken_texts(record: Record) -> str:
    """Return the contents of a record's system, user and assistant turns, joined by line ends. Tool calls and their
    results are left out, since they are code."""
    if isinstance(record, str):
        return record
    return "\n".join(turn.content for turn in list_turns(record) if turn.role != "tool")


def list_trained_texts(record: Record) -> list[str]:
    """Return the texts that a model learns to write: trained answers, chosen answers, answers labelled as desirable,
    and plain text.

    Rejected answers are left out, since they may be rejected for a refusal or for repetition.
    """
    if isinstance(record, str):
        return [record]
    if isinstance(record, Conversation):
        answers = record.messages
    elif isinstance(record, Preference):
        answers = record.chosen
    else:
        answers = record.completion if record.label else ()
    return [turn.content for turn in answers if turn.role == "assistant" and turn.trained]


def list_documents(record: Record) -> Sequence[Document]:
    """Return a record as documents (texts or conversations): two for a pair, its prompt with each answer, and one for
    any other."""
    if isinstance(record, Preference):
        return [join_answer(record, answer) for answer in (record.chosen, record.rejected)]
    return [join_answer(record, record.completion) if isinstance(record, Feedback) else record]


def rewrite_texts(
    record: Record, change: Callable[[str], str], change_name: Callable[[str], str] = str
) -> Record | Drop:
    """Return a record with `change` applied to all its texts, or a Drop if the answers of a pair become equal.

    Args:
        change_name: applied to the names of arguments of tool calls.
    """
    try:
        changed = map_texts(record, change, change_name)
        return record if changed == record else changed
    except ValueError:
        return Drop("answers alike", "chosen and rejected are the same after this step")


# Checks of the arguments of steps. The field of an error is the argument's name. `align.data.clean.steps`
# puts the position of the step in front of it.


def check_optional_integer(name: str, value: Any, minimum: int = 0) -> None:
    """Raise InputError if `value` is neither an integer of at least `minimum` nor None."""
    is_valid = value is None or (isinstance(value, int) and is_number(value) and value >= minimum)
    problem = "is out of range" if is_number(value) else "is no whole number"
    require(is_valid, name, value, problem, f"Give a whole number of at least {minimum}.")


def check_optional_share(name: str, value: Any) -> None:
    """Raise InputError if `value` is neither a number from 0 to 1 nor None."""
    is_valid = value is None or (is_number(value) and 0 <= value <= 1)
    require(is_valid, name, value, "is no share", "Give a number from 0 to 1.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise InputError if `value` is not one of `choices`."""
    is_valid = isinstance(value, str) and value in choices
    require(is_valid, name, value, f"is none of {', '.join(choices)}", suggest_choice(value, choices))


def check_choice_list(name: str, value: Any, choices: Collection[str], example: str, allow_empty: bool = False) -> None:
    """Raise InputError if `value` is not a tuple with at least one item, or has an item that is not in `choices`.

    Args:
        example: a valid list, for the error.
        allow_empty: accept an empty tuple.
    """
    is_list = isinstance(value, tuple) and (allow_empty or bool(value))
    require(is_list, name, value, "is no list of names", f"Write a list, such as {name}: {example}.")
    for entry in value:
        problem = f"has {entry!r}, which is none of {', '.join(sorted(choices))}"
        is_valid = isinstance(entry, str) and entry in choices
        require(is_valid, name, list(value), problem, suggest_choice(entry, choices))


def suggest_choice(value: Any, choices: Iterable[str]) -> str:
    """Return the remedy for a value that is not one of `choices`: the most similar choice, or all of them."""
    choices = list(choices)
    matches = get_close_matches(str(value), choices, n=1)
    return f"Did you mean {matches[0]}?" if matches else f"Choose from: {', '.join(choices)}."


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
