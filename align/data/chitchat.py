"""The built-in corpus: people chatting in pairs (`chitchat-dataset` on PyPI, MIT), divided by conversation.

A conversation belongs to exactly one part, by the hash of its id, so that no line of one part stands in another:
`base` trains the built-in model as plain text, `sft` is the instruction-tuning set, `prompts` is what answers are
sampled for, `test` is what nothing trains on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from align.core.distribution import require_extra
from align.core.errors import InputError
from align.core.types import Conversation, Message

PARTS = {"base": 68, "sft": 14, "prompts": 12, "test": 6}  # percent of conversations, in this order
WINDOW = 6  # turns of one training example: three exchanges
RATING_BAR = 6.0  # of 10: what the instruction-tuning set keeps, where people rated the conversation
CONTEXT = 3  # turns of a prompt at the most
PROMPT_CHARACTERS = 100  # of a prompt at the most, so that a small model answers to what it can hold


def corpus_path() -> Path:
    """The JSON file inside the installed package.

    Raises:
        InputError: the package is not installed.
    """
    require_extra("demo", "data", "chitchat")
    spec = find_spec("chitchat_dataset")
    assert spec is not None
    return Path(str(spec.origin)).parent / "dataset.json"


def part_holding(conversation_id: str) -> str:
    """The part that a conversation belongs to."""
    share = int(hashlib.sha256(conversation_id.encode()).hexdigest()[:8], 16) % 100
    for part, percent in PARTS.items():
        if share < percent:
            return part
        share -= percent
    raise AssertionError("the parts add up to 100")


def turns(record: Mapping[str, Any]) -> list[str]:
    """One text a turn: what one person wrote before the other did, joined by spaces."""
    joined = (" ".join(m["text"].strip() for m in turn if m["text"].strip()) for turn in record["messages"])
    return [text for text in joined if text]


def rating(record: Mapping[str, Any]) -> float | None:
    """Mean of the people's ratings, out of 10; None where nobody rated."""
    scores = [float(v) for v in (record.get("ratings") or {}).values()]
    return sum(scores) / len(scores) if scores else None


def conversations_in(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The conversations of one part, in the corpus's order, with their ids."""
    if part not in PARTS:
        raise InputError("data.part", part, "is no part of the corpus", f"Choose one of: {', '.join(PARTS)}.")
    for key, record in records().items():
        if part_holding(key) == part:
            yield key, record


def records() -> dict[str, dict[str, Any]]:
    """The whole corpus by conversation id."""
    return json.loads(corpus_path().read_text(encoding="utf-8"))


def texts(part: str) -> list[str]:
    """Conversations as plain text, a turn a line: what the base model learns language from."""
    return ["\n".join(lines) for _, record in conversations_in(part) if len(lines := turns(record)) >= 2]


def as_chat(lines: list[str], id: str) -> Conversation:
    """Alternating turns as messages: who speaks first is the user."""
    return Conversation(tuple(Message("assistant" if i % 2 else "user", t) for i, t in enumerate(lines)), id)


def conversations(part: str) -> list[Conversation]:
    """Windows of three exchanges for instruction tuning; of the rated conversations, only the well rated."""
    found = []
    for key, record in conversations_in(part):
        lines = turns(record)
        if (rating(record) or 10.0) < RATING_BAR:
            continue
        for start in range(0, len(lines) - 1, WINDOW):
            window = lines[start : start + WINDOW]
            window = window[: len(window) // 2 * 2]
            if window:
                found.append(as_chat(window, f"{key}:{start}"))
    return found


def contexts(part: str) -> list[Conversation]:
    """Contexts of one or three turns, each ending where the other person answered; no context twice."""
    found: dict[tuple[str, ...], str] = {}
    for key, record in conversations_in(part):
        lines = turns(record)
        for end in range(1, len(lines)):
            context = lines[end - CONTEXT if end >= CONTEXT else end - 1 : end]
            if sum(map(len, context)) <= PROMPT_CHARACTERS:
                found.setdefault(tuple(context), f"{key}:{end}")
    return [as_chat(list(context), id) for context, id in found.items()]
