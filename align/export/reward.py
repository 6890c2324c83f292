"""A reward model as others read it: the texts that two of them are compared on, and a tokenizer that leads whoever uses
it to the score that was trained.

transformers takes the score at the last token that is not the pad token, vLLM at the last one. Training read it at the
token that ends the answer's turn. So a pad token that ends turns is replaced, and what the chat template writes behind
the last answer is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import assistant_spans, encode_judged, render, stop_token_ids
from align.data.chat.fixed_prompts import LONGEST, PROMPTS
from align.data.chat.template import quoted
from align.data.chat.tokens import for_others, special_ids

ASKED = "12 + 30 * 2 = ?"
REASONED = ("<think>\nThe product first.\n</think>\n\n72.", "72.\n</think>\n\nThe product comes first: 12 + 60 = 72.")
"""Answers that many templates take apart: with reasoning, and with an end of it that nothing began."""


def fixed_conversations(tokenizer: Any, longest: int = LONGEST) -> list[Conversation]:
    """The fixed prompts, each with the beginning of the next one for an answer, and two with an answer of `REASONED`.
    One that the chat template refuses, or that is too long, is left out.

    Args:
        longest: tokens that the model has positions for.
    """
    asked = json.loads(PROMPTS.read_text(encoding="utf-8"))
    chats = [[*turns, after[0]] for turns, after in zip(asked, [*asked[1:], asked[0]], strict=True)]
    found = []
    for said in (*chats, *([ASKED, answer] for answer in REASONED)):
        roles = ("user", "assistant") * len(said)
        conversation = Conversation(tuple(map(Message, roles[: len(said)], said)))
        with suppress(InputError):
            if len(judged(tokenizer, [conversation])[0]) <= min(LONGEST, longest):
                found.append(conversation)
    return found


def judged(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids as training read them: each ends where the score is read."""
    stops = stop_token_ids(tokenizer)
    rows = []
    for conversation in conversations:
        *before, last = conversation.messages
        rows.append(encode_judged(tokenizer, Conversation(tuple(before)), last.content, True, stops))
    return rows


def as_chats(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    """Token ids as others read them: by transformers' own `apply_chat_template`."""
    as_text: dict[str, Any] = {"sanitize_control_tokens": True, "return_dict": True}
    return [list(tokenizer.apply_chat_template(c.as_dicts(), **as_text)["input_ids"]) for c in conversations]


def for_scoring(tokenizer: Any, conversations: Sequence[Conversation]) -> Any:
    """A copy of the tokenizer that a reward model was trained with, for others to use it by.

    Args:
        conversations: of `fixed_conversations`.
    """
    made = for_others(tokenizer)
    ends = {*stop_token_ids(tokenizer), *(row[-1] for row in judged(tokenizer, conversations))}
    made.pad_token = pad_beside(tokenizer, ends)
    made.chat_template = ending_at_score(tokenizer, conversations)
    return made


def pad_beside(tokenizer: Any, ends: set[int]) -> str | None:
    """A special token to pad with that ends no text; None where there is none, and texts can be scored one at a time
    alone."""
    first = [id for id in (tokenizer.pad_token_id, tokenizer.unk_token_id) if id is not None]
    usable = (id for id in (*first, *sorted(special_ids(tokenizer))) if id not in ends)
    pad = next(usable, None)
    return None if pad is None else tokenizer.convert_ids_to_tokens(pad)


def ending_at_score(tokenizer: Any, conversations: Sequence[Conversation]) -> str:
    """The chat template without what it writes behind the last answer's turn, which would move the score there; as it
    stands where that is nothing."""
    template = tokenizer.chat_template
    texts = [(text, spans[-1][1]) for text, spans in (assistant_spans(tokenizer, c) for c in conversations)]
    tails = {text[end:] for text, end in texts}
    if tails <= {""}:
        return template
    tail = max(tails, key=len)
    made = copy.deepcopy(tokenizer)
    made.chat_template = WITHOUT_TAIL.format(
        template=template.removesuffix("\n"), tail=quoted(tail), length=len(tail)
    )  # fmt: skip
    if any(render(made, c) != text[:end] for c, (text, end) in zip(conversations, texts, strict=True)):
        problem = f"what it writes behind an answer ({tail!r}) cannot be left out"
        raise InputError("chat_template", "(the model's)", problem, "Train the reward model with data.template=chatml.")
    return made.chat_template


# `+` keeps the blanks beside a tag, and the line break behind it, which the template writes.
WITHOUT_TAIL = """{{%- set rendered +%}}{template}{{%+ endset -%}}
{{%- set rendered = rendered | string -%}}
{{%- if messages[-1].role == "assistant" and rendered.endswith({tail}) -%}}
  {{{{- rendered[:-{length}] -}}}}
{{%- else -%}}
  {{{{- rendered -}}}}
{{%- endif -%}}
"""
