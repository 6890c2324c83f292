"""A record as training reads it, for whoever looks: by a chat template, token by token; or turn by turn, where no model
says how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from align.data.chat import encode_conversation
from align.data.read.content import taught
from align.data.supervised import encode_text
from align.data.trained_on import in_loss, shown
from align.errors import InputError
from align.track import turn_text
from align.types import Conversation, Feedback, Preference, Record

WHOLE = 10**9
"""Tokens of a text that is not parted."""
Render = Callable[[Record], list[dict[str, Any]]]
"""A record as lines: `what` it is (`chosen` or `rejected` of a pair), its `parts` (`{text, trained, special}`), and
where a template rendered it, its `tokens` and how many are `trained`; `refused` says why it did not."""


def renderer(tokenizer: Any | None) -> Render:
    """Renders by the chat template of a tokenizer; turn by turn where there is none."""
    return turn_by_turn if tokenizer is None else partial(token_by_token, tokenizer)


def sides(record: Record) -> Iterator[tuple[str, str | Conversation]]:
    """What training reads of a record: of a pair its prompt with either answer, on which the loss is."""
    if isinstance(record, Preference):
        for side in ("chosen", "rejected"):
            yield side, taught(record, getattr(record, side))
    elif isinstance(record, Feedback):
        yield "wanted" if record.label else "not wanted", taught(record, record.completion)
    else:
        yield "", record


def turn_by_turn(record: Record) -> list[dict[str, Any]]:
    """Each turn with who speaks; what the assistant says is trained on, and so is plain text."""
    return [{"what": what, "parts": spoken(said)} for what, said in sides(record)]


def spoken(said: str | Conversation) -> list[Mapping[str, Any]]:
    if isinstance(said, str):
        return [part(said, trained=True)]
    tools = [part(f"tools: {', '.join(tool.name for tool in said.tools)}\n")] if said.tools else []
    turns, last = [], len(said.messages) - 1
    for i, turn in enumerate(said.messages):
        trained = turn.role == "assistant" and turn.trained
        turns += [part(f"{turn.role}: "), part(turn_text(turn.as_dict()), trained), *([part("\n")] if i < last else [])]
    return [*tools, *turns]


def part(text: str, trained: bool = False) -> Mapping[str, Any]:
    return {"text": text, "trained": trained, "special": False}


def token_by_token(tokenizer: Any, record: Record) -> list[dict[str, Any]]:
    """As a chat template writes it, decoded from the very tokens."""
    lines = []
    for what, said in sides(record):
        try:
            rows = (
                encode_text(tokenizer, said, WHOLE) if isinstance(said, str) else [encode_conversation(tokenizer, said)]
            )
        except InputError as error:
            lines.append({"what": what, "parts": spoken(said), "refused": error.problem})
        else:
            lines += [shown(tokenizer, what, row.input_ids, in_loss(row)) for row in rows]
    return lines
