"""What a step of cleaning makes of a record, what steps look at, and the checks of their arguments."""

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
    """A record is left out.

    Attributes:
        reason: stable words that are counted by: `language: de`, `repetition: lines`.
        detail: what was found in this record, for the kept example.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Noted:
    """A record is kept, and something is counted of it.

    Attributes:
        record: as the step leaves it, the very same object where it changes nothing.
        notes: stable words, each counted once: a language, a kind of personal data.
    """

    record: Record
    notes: tuple[str, ...]


Outcome = Record | Drop | Noted
Step = Callable[[Record], Outcome]
"""One step: pure, and idempotent. It returns the very same record where it changes nothing."""


def said(record: Record) -> str:
    """All texts of a record as one, by which a step sees at one look that the record does not concern it."""
    return record if isinstance(record, str) else "\n".join(list_texts(record))


def spoken(record: Record) -> str:
    """What people and the assistant say in a record, without calls of tools and their results: these are code."""
    return record if isinstance(record, str) else "\n".join(t.content for t in list_turns(record) if t.role != "tool")


def imitated(record: Record) -> list[str]:
    """The texts that a model learns to write: answers that are trained on, chosen answers, wanted answers, and plain
    text. A rejected answer may well be a refusal or repeat itself: that is what it is rejected for."""
    if isinstance(record, str):
        return [record]
    if isinstance(record, Conversation):
        answers = record.messages
    elif isinstance(record, Preference):
        answers = record.chosen
    else:
        answers = record.completion if record.label else ()
    return [turn.content for turn in answers if turn.role == "assistant" and turn.trained]


def sequences(record: Record) -> Sequence[Document]:
    """Return the documents that a record is read as: a pair is two, its prompt with either answer."""
    if isinstance(record, Preference):
        return [join_answer(record, answer) for answer in (record.chosen, record.rejected)]
    return [join_answer(record, record.completion) if isinstance(record, Feedback) else record]


def rewritten(record: Record, change: Callable[[str], str], named: Callable[[str], str] = str) -> Record | Drop:
    """The record with each of its texts changed. A pair whose answers become equal is no pair.

    Args:
        named: changes names of arguments of calls.
    """
    try:
        made = map_texts(record, change, named)
        return record if made == record else made
    except ValueError:
        return Drop("answers alike", "chosen and rejected are the same after this step")


# --- Arguments of steps, checked where a step is made. The field of an error is the argument's name; who reads the
# setting puts the step's place in front of it.


def check_whole(name: str, value: Any, least: int = 0) -> None:
    """Raise InputError if `value` is neither a whole number of at least `least` nor None."""
    whole = value is None or (isinstance(value, int) and is_number(value) and value >= least)
    problem = "is out of range" if is_number(value) else "is no whole number"
    require(whole, name, value, problem, f"Give a whole number of at least {least}.")


def check_share(name: str, value: Any) -> None:
    """Raise InputError if `value` is neither a share of a whole nor None."""
    inside = value is None or (is_number(value) and 0 <= value <= 1)
    require(inside, name, value, "is no share", "Give a number from 0 to 1.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise InputError if `value` is none of `choices`."""
    known = isinstance(value, str) and value in choices
    require(known, name, value, f"is none of {', '.join(choices)}", suggest(value, choices))


def check_list(name: str, value: Any, choices: Collection[str], example: str, empty: bool = False) -> None:
    """Raise InputError if `value` is no list, an empty one although that means nothing, or holds what is no choice."""
    listed = isinstance(value, tuple) and (empty or bool(value))
    require(listed, name, value, "is no list of names", f"Write a list, such as {name}: {example}.")
    for entry in value:
        problem = f"has {entry!r}, which is none of {', '.join(sorted(choices))}"
        known = isinstance(entry, str) and entry in choices
        require(known, name, list(value), problem, suggest(entry, choices))


def suggest(given: Any, choices: Iterable[str]) -> str:
    """Return the remedy for a name that is none of `choices`."""
    choices = list(choices)
    close = get_close_matches(str(given), choices, n=1)
    return f"Did you mean {close[0]}?" if close else f"Choose from: {', '.join(choices)}."


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
