"""Turns: those that say nothing, and their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from align.data.clean.arguments import check_choice
from align.data.clean.characters import SEEN
from align.data.clean.outcome import Drop, sequences
from align.data.reasoning import OPEN, answer_alone
from align.types import Conversation, Feedback, Message, Preference, Record

BEHIND: Mapping[str, tuple[str, ...]] = {
    "system": ("",), "user": ("", "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
}  # fmt: skip
"""Role → the roles that it may follow; the empty name is the beginning."""


@dataclass(frozen=True, slots=True)
class Empty:
    """Leaves out records with turns that say nothing. Where these are the last, they are cut off, with the question
    that they leave unanswered, and the rest is kept.

    Answers that are not trained on may say nothing, as may a system turn, and the answers of pairs and of feedback:
    models give such answers, and people judge them.
    """

    def __call__(self, record: Record) -> Record | Drop:
        if isinstance(record, str):
            return record if SEEN.search(record) else Drop("empty", "the text says nothing")
        turns = record.prompt if isinstance(record, Preference | Feedback) else record.messages
        silent = [i for i, turn in enumerate(turns) if not speaks(turn)]
        if not silent:
            return record
        if not isinstance(record, Conversation):
            return Drop("empty turn", f"the {turns[silent[0]].role}'s turn {silent[0]} says nothing")
        kept = without_silent_end(turns)
        if len(kept) > silent[0]:
            return Drop("empty turn", f"the {turns[silent[0]].role}'s turn {silent[0]} says nothing")
        if all(turn.role == "system" for turn in kept):
            return Drop("empty", "no question is answered")
        return replace(record, messages=kept)


def without_silent_end(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns up to the last that speaks; where an answer is cut off, up to the answer before it."""
    kept = turns
    while kept and not speaks(kept[-1]):
        kept = kept[:-1]
    if any(turn.role == "assistant" for turn in turns[len(kept) :]):
        while kept and kept[-1].role != "assistant":
            kept = kept[:-1]
    return kept


def speaks(turn: Message) -> bool:
    """Whether a turn says something, or need not: a tool may return nothing, and a call says what to do."""
    if turn.role in ("system", "tool") or turn.tool_calls or not turn.trained:
        return True
    text = turn.content
    if text[:1].isascii() and text[:1].isalnum():  # nearly all of them
        return True
    if turn.role == "assistant" and OPEN in text:
        text = answer_alone(text)
    return SEEN.search(text) is not None


@dataclass(frozen=True, slots=True)
class Roles:
    """Leaves out conversations whose turns come in another order than chat templates know: a system turn first or
    nowhere, then the user and the assistant in turn, with results of tools behind what the assistant calls.

    Args:
        ends: `assistant` where the last turn has to be an answer, `any` where questions without an answer are wanted
            too.
    """

    ends: str = "assistant"

    def __post_init__(self) -> None:
        check_choice("ends", self.ends, ("assistant", "any"))

    def __call__(self, record: Record) -> Record | Drop:
        for conversation in sequences(record):
            before = ""
            for i, turn in enumerate(conversation.messages):
                if before not in BEHIND[turn.role]:
                    behind = f"follows the {before}'s" if before else "is the first"
                    return Drop("role order", f"turn {i}, the {turn.role}'s, {behind}")
                before = turn.role
            if before != "assistant" and self.ends == "assistant":
                return Drop("no answer", f"the last turn is the {before}'s; {{roles: {{ends: any}}}} keeps such")
        return record
