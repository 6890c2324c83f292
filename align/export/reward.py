"""Reward models for other programs: test conversations, and a tokenizer with which these programs compute the trained
score.

transformers reads the score at the last token that is not the pad token, vLLM at the last token. Training read it at
the token that ends the answer's turn. So a pad token that also ends turns is replaced, and text that the chat template
writes behind the last answer is removed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import encode_for_reward_model, find_stop_token_ids, render, render_with_assistant_spans
from align.data.chat.fixed_prompts import LONGEST, PROMPTS
from align.data.chat.template import quote_jinja
from align.data.chat.tokens import copy_tokenizer_for_export, get_special_token_ids

ASKED = "12 + 30 * 2 = ?"
REASONED = ("<think>\nThe product first.\n</think>\n\n72.", "72.\n</think>\n\nThe product comes first: 12 + 60 = 72.")
"""Answers that many chat templates change: one with reasoning, and one with an end of reasoning that never began."""


def make_test_conversations(tokenizer: Any, max_tokens: int = LONGEST) -> list[Conversation]:
    """Return test conversations for a reward model, built from the fixed prompts and from `REASONED`.

    In those from prompts, the first turn of the next prompt is the answer.

    Conversations that the chat template refuses, or that are too long, are left out.

    Args:
        max_tokens: number of the model's positions.
    """
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    chats = [[*turns, next_turns[0]] for turns, next_turns in zip(prompts, [*prompts[1:], prompts[0]], strict=True)]
    conversations = []
    for texts in (*chats, *([ASKED, answer] for answer in REASONED)):
        roles = ("user", "assistant") * len(texts)
        conversation = Conversation(tuple(map(Message, roles[: len(texts)], texts)))
        with suppress(InputError):
            if len(encode_as_trained(tokenizer, [conversation])[0]) <= min(LONGEST, max_tokens):
                conversations.append(conversation)
    return conversations


def encode_as_trained(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Return the token ids of conversations as reward model training read them: each row ends at the token with the
    score."""
    stops = find_stop_token_ids(tokenizer)
    rows = []
    for conversation in conversations:
        *context, last = conversation.messages
        rows.append(encode_for_reward_model(tokenizer, Conversation(tuple(context)), last.content, True, stops))
    return rows


def encode_as_chats(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Return the token ids of conversations as other programs compute them, with transformers'
    `apply_chat_template`."""
    options: dict[str, Any] = {"sanitize_control_tokens": True, "return_dict": True}
    return [list(tokenizer.apply_chat_template(c.as_dicts(), **options)["input_ids"]) for c in conversations]


def make_scoring_tokenizer(tokenizer: Any, conversations: Sequence[Conversation]) -> Any:
    """Return a copy of a reward model's tokenizer with which other programs compute the trained score.

    Its pad token ends no text, and its chat template ends at the answer's last token.

    Args:
        conversations: result of `make_test_conversations`.
    """
    copied = copy_tokenizer_for_export(tokenizer)
    ends = {*find_stop_token_ids(tokenizer), *(row[-1] for row in encode_as_trained(tokenizer, conversations))}
    copied.pad_token = choose_pad_token(tokenizer, ends)
    copied.chat_template = truncate_template_after_answer(tokenizer, conversations)
    return copied


def choose_pad_token(tokenizer: Any, last_token_ids: set[int]) -> str | None:
    """Return a special token that ends no text, to be used as pad token, or None if none exists.

    Without one, other programs can score only one text at a time.
    """
    preferred = [id for id in (tokenizer.pad_token_id, tokenizer.unk_token_id) if id is not None]
    usable = (id for id in (*preferred, *sorted(get_special_token_ids(tokenizer))) if id not in last_token_ids)
    pad = next(usable, None)
    return None if pad is None else tokenizer.convert_ids_to_tokens(pad)


def truncate_template_after_answer(tokenizer: Any, conversations: Sequence[Conversation]) -> str:
    """Return the chat template without the text that it writes after the last answer, where other programs would read
    the score.

    Raises:
        InputError: The text cannot be removed.
    """
    template = tokenizer.chat_template
    texts = [(text, spans[-1][1]) for text, spans in (render_with_assistant_spans(tokenizer, c) for c in conversations)]
    tails = {text[end:] for text, end in texts}
    if tails <= {""}:
        return template
    tail = max(tails, key=len)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = WITHOUT_TAIL.format(
        template=template.removesuffix("\n"), tail=quote_jinja(tail), length=len(tail)
    )
    if any(render(changed, c) != text[:end] for c, (text, end) in zip(conversations, texts, strict=True)):
        problem = f"what it writes behind an answer ({tail!r}) cannot be left out"
        raise InputError("chat_template", "(the model's)", problem, "Train the reward model with data.template=chatml.")
    return changed.chat_template


# `+` keeps blanks beside a tag and the line break behind it, which belong to the template's text.
WITHOUT_TAIL = """{{%- set rendered +%}}{template}{{%+ endset -%}}
{{%- set rendered = rendered | string -%}}
{{%- if messages[-1].role == "assistant" and rendered.endswith({tail}) -%}}
  {{{{- rendered[:-{length}] -}}}}
{{%- else -%}}
  {{{{- rendered -}}}}
{{%- endif -%}}
"""
