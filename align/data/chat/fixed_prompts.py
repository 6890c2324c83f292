"""Fixed prompts, on which exports, engines and tokenizers are compared with the trained model."""

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
"""Number of tokens in the prompt of tokens from all over the vocabulary."""
LONGEST = 256
"""Maximum tokens of a prompt. Longer ones are left out."""


def encode_fixed_prompts(tokenizer: Any, max_tokens: int = LONGEST) -> list[list[int]]:
    """Return the token ids of the test prompts of `fixed_prompts.json`, on which the outputs of two models are
    compared.

    The last prompt is not text, but tokens from all over the vocabulary, for tokenizers of other languages.

    Args:
        max_tokens: maximum tokens that the model has positions for.
    """
    special = set(tokenizer.all_special_ids)
    ordinary = [token_id for token_id in range(len(tokenizer)) if token_id not in special]
    spread = [ordinary[i * len(ordinary) // SPREAD] for i in range(SPREAD)]
    return [*(ids for _, ids in render_fixed_prompts(tokenizer, max_tokens)), spread[:max_tokens]]


def render_fixed_prompts(tokenizer: Any, max_tokens: int = LONGEST) -> list[tuple[str, list[int]]]:
    """Return (text, token ids) of each test prompt of `fixed_prompts.json`, rendered with the chat template and the
    generation prompt.

    Prompts that the template refuses and prompts that are too long are left out.
    """
    roles = ("user", "assistant")
    prompts = []
    for turns in json.loads(PROMPTS.read_text(encoding="utf-8")):
        conversation = Conversation(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))
        with suppress(InputError):
            [prompt], _ = encode_prompts(tokenizer, [conversation], min(LONGEST, max_tokens))
            prompts.append((render(tokenizer, conversation, add_generation_prompt=True), prompt.input_ids))
    return prompts
