"""The built-in corpus of two-person chats (`chitchat-dataset` on PyPI, MIT), divided by conversation.

The hash of a conversation's id assigns it to exactly one part, so that the parts share no line: `base` is plain text
for training the built-in model, `sft` is for instruction tuning, `prompts` is for sampling answers, and `test` is never
trained on.
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
WINDOW_TURNS = 6  # turns of one training example: three exchanges
MIN_RATING = 6.0  # of 10: minimum rating of a rated conversation in the instruction-tuning set
MAX_PROMPT_TURNS = 3  # maximum turns of a prompt
MAX_PROMPT_CHARACTERS = 100  # maximum of a prompt, which a small model can still answer


def get_corpus_path() -> Path:
    """Return the path of the corpus's JSON file in the installed package `chitchat_dataset`.

    Raises:
        InputError: the package is not installed.
    """
    require_extra("demo", "data", "chitchat")
    spec = find_spec("chitchat_dataset")
    assert spec is not None
    return Path(str(spec.origin)).parent / "dataset.json"


def assign_part(conversation_id: str) -> str:
    """Return the part of the corpus, a key of `PARTS` such as `sft`, that the hash of a conversation's id selects."""
    share = int(hashlib.sha256(conversation_id.encode()).hexdigest()[:8], 16) % 100
    for part, percent in PARTS.items():
        if share < percent:
            return part
        share -= percent
    raise AssertionError("the parts add up to 100")


def join_turns(record: Mapping[str, Any]) -> list[str]:
    """Return one text per turn of a chat: the consecutive messages of one person, joined by spaces. Empty messages and
    turns are left out."""
    texts = (
        " ".join(message["text"].strip() for message in turn if message["text"].strip()) for turn in record["messages"]
    )
    return [text for text in texts if text]


def compute_rating(record: Mapping[str, Any]) -> float | None:
    """Return the mean of a conversation's ratings, out of 10, or None if it has no ratings."""
    scores = [float(v) for v in (record.get("ratings") or {}).values()]
    return sum(scores) / len(scores) if scores else None


def iter_part(part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (id, record) of each conversation in one part of the corpus, such as `sft`, in the corpus's order. Raises
    InputError if there is no such part."""
    if part not in PARTS:
        raise InputError("data.part", part, "is no part of the corpus", f"Choose one of: {', '.join(PARTS)}.")
    for key, record in load_records().items():
        if assign_part(key) == part:
            yield key, record


def load_records() -> dict[str, dict[str, Any]]:
    """Load the whole corpus from its JSON file as a dictionary from conversation id to record, with its messages and
    ratings."""
    return json.loads(get_corpus_path().read_text(encoding="utf-8"))


def load_texts(part: str) -> list[str]:
    """Return the conversations of a part as plain text with one turn per line, to train the base model on.
    Conversations of one turn are left out."""
    return ["\n".join(lines) for _, record in iter_part(part) if len(lines := join_turns(record)) >= 2]


def to_conversation(lines: list[str], id: str) -> Conversation:
    """Build a conversation from alternating turns, with the first speaker as the user and the other one as the
    assistant."""
    return Conversation(tuple(Message("assistant" if i % 2 else "user", t) for i, t in enumerate(lines)), id)


def load_conversations(part: str) -> list[Conversation]:
    """Cut the conversations of a part into windows of up to three user-assistant exchanges for instruction tuning.
    Conversations with a mean rating below `MIN_RATING` are left out."""
    windows = []
    for key, record in iter_part(part):
        lines = join_turns(record)
        rating = compute_rating(record)
        if rating is not None and rating < MIN_RATING:
            continue
        for start in range(0, len(lines) - 1, WINDOW_TURNS):
            window = lines[start : start + WINDOW_TURNS]
            window = window[: len(window) // 2 * 2]
            if window:
                windows.append(to_conversation(window, f"{key}:{start}"))
    return windows


def load_prompts(part: str) -> list[Conversation]:
    """Return the distinct prompts of one or three turns in a part, each of which ends before an answer. Prompts of more
    than `MAX_PROMPT_CHARACTERS` characters are left out."""
    id_of_context: dict[tuple[str, ...], str] = {}
    for key, record in iter_part(part):
        lines = join_turns(record)
        for end in range(1, len(lines)):
            context = lines[end - MAX_PROMPT_TURNS if end >= MAX_PROMPT_TURNS else end - 1 : end]
            if sum(map(len, context)) <= MAX_PROMPT_CHARACTERS:
                id_of_context.setdefault(tuple(context), f"{key}:{end}")
    return [to_conversation(list(context), id) for context, id in id_of_context.items()]
