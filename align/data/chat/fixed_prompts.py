"""Prompts that never change: what an export, an engine or a tokenizer is asked, beside the model that was trained."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import encode_prompts, render

PROMPTS = Path(__file__).with_name("fixed_prompts.json")
SPREAD = 64
LONGEST = 256
"""Tokens of a prompt at most: a tokenizer that needs more for one leaves it out."""


def fixed_prompts(tokenizer: Any, longest: int = LONGEST) -> list[list[int]]:
    """Token ids of the prompts that two models, or one in two engines, are compared on. The last one is no text, but
    tokens from all over the vocabulary, for a tokenizer that knows none of our words.

    Args:
        longest: tokens that the model has positions for.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = [id for id in range(len(tokenizer)) if id not in special]
    spread = [ordinary[i * len(ordinary) // SPREAD] for i in range(SPREAD)]
    return [*(ids for _, ids in fixed_texts(tokenizer, longest)), spread[:longest]]


def fixed_texts(tokenizer: Any, longest: int = LONGEST) -> list[tuple[str, list[int]]]:
    """The fixed prompts through the chat template, each as text and as token ids. One that the template refuses, or
    that is too long, is left out."""
    roles = ("user", "assistant")
    found = []
    for turns in json.loads(PROMPTS.read_text(encoding="utf-8")):
        conversation = Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))
        with suppress(InputError):
            [prompt], _ = encode_prompts(tokenizer, [conversation], min(LONGEST, longest))
            found.append((render(tokenizer, conversation, answer_due=True), prompt.input_ids))
    return found
