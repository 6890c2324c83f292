"""What a step of cleaning makes of a record, and what steps look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from align.data.read.content import texts, turns, with_answer, with_texts
from align.types import Conversation, Feedback, Preference, Record


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
    return record if isinstance(record, str) else "\n".join(texts(record))


def spoken(record: Record) -> str:
    """What people and the assistant say in a record, without calls of tools and their results: these are code."""
    return record if isinstance(record, str) else "\n".join(t.content for t in turns(record) if t.role != "tool")


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


def sequences(record: Record) -> list[Conversation]:
    """The conversations that a record is read as: a pair is two, its prompt with either answer; plain text is none."""
    if isinstance(record, str):
        return []
    if isinstance(record, Conversation):
        return [record]
    answers = [record.completion] if isinstance(record, Feedback) else [record.chosen, record.rejected]
    return [with_answer(record, answer) for answer in answers]


def rewritten(record: Record, change: Callable[[str], str], named: Callable[[str], str] = str) -> Record | Drop:
    """The record with each of its texts changed. A pair whose answers become equal is no pair.

    Args:
        named: changes names of arguments of calls.
    """
    try:
        made = with_texts(record, change, named)
        return record if made == record else made
    except ValueError:
        return Drop("answers alike", "chosen and rejected are the same after this step")
