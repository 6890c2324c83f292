"""Answers as whoever judges them reads them, where reasoning is hidden: without it, as text and as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from align.data.chat import Prompt, encode_judged, prompt_length
from align.data.reasoning import OPEN, answer_alone
from align.models.backbone import answered
from align.rollout.engine import response_ids
from align.types import Rollout


def texts_alone(prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Any) -> list[str]:
    """The answers without their reasoning; nothing of one that was cut before its reasoning ended."""
    opened = [tokenizer.decode(p.input_ids[-8:]).rstrip().endswith(OPEN) for p in prompts]  # by the template's header
    return [answer_alone(text, was) for text, was in zip(texts, opened, strict=True)]


def answers_alone(
    prompts: Sequence[Prompt], texts: Sequence[str], rollout: Rollout, tokenizer: Any, stops: Sequence[int]
) -> tuple[list[str], Rollout]:
    """The answers without their reasoning, as text, and as a reward model on the sampler's base was trained to read
    them: each that has reasoning is encoded anew without it, the others are the very tokens that were sampled.

    Args:
        texts: what `rollout` says.
        stops: the tokens that end a turn.
    """
    read, asked, said = texts_alone(prompts, texts, tokenizer), [], []
    rows = zip(prompts, texts, read, response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    for prompt, whole, text, ids, ended in rows:
        before, after = list(prompt.input_ids), ids
        if text != whole:
            judged = encode_judged(tokenizer, prompt.conversation, text, ended, stops)
            # A row has a token on either side, and an answer that is nothing but reasoning has none of its own.
            start = min(prompt_length(tokenizer, prompt.conversation, judged), len(judged) - 1)
            before, after = judged[:start], judged[start:]
        asked.append(before)
        said.append(after)
    made = answered(asked, said, tokenizer.pad_token_id, rollout.tokens_BS.device)
    return read, replace(made, ended_B=rollout.ended_B)
