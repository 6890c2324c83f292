"""Answers as their judge reads them: whole, or without the reasoning that they begin with.

Where reasoning is hidden, that of earlier turns is too: a judge reads no thoughts but those that it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from align.core.types import Conversation, Rollout
from align.data.chat.encode import Prompt, encode_judged, prompt_length, stop_token_ids
from align.data.chat.reasoning import OPEN, parted, without_reasoning
from align.models.forward import rollout_from_answers
from align.rollout.engine import response_ids


class Judged(NamedTuple):
    """Answers as they are judged.

    Attributes:
        conversations: the prompts with the answers.
        rollout: the same as tokens.
        reasoning: what was taken out of each answer; None of each where nothing is hidden.
    """

    conversations: list[Conversation]
    rollout: Rollout
    reasoning: Sequence[str | None]


def whole(prompts: Sequence[Prompt], texts: Sequence[str], rollout: Rollout) -> Judged:
    """All that was said."""
    conversations = [p.conversation.with_answer(text) for p, text in zip(prompts, texts, strict=True)]
    return Judged(conversations, rollout, [None] * len(texts))


def answer_reader(hides: bool, tokenizer: Any, generation_config: Any) -> Callable[..., Judged]:
    """Return the function that turns prompts, answers and tokens into what scorers read.

    Args:
        hides: answers are read without their reasoning (`rollout.reasoning=hide`).
    """
    if not hides:
        return whole
    return partial(answers_alone, tokenizer=tokenizer, stops=stop_token_ids(tokenizer, generation_config))


def parted_texts(
    prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Any, hides: bool
) -> tuple[Sequence[str | None], Sequence[str]]:
    """The reasoning of each answer, and the answers without it, where that is hidden; nothing is left of one whose
    reasoning never ended. Where nothing is hidden, None of each and the answers as they are."""
    if not hides:
        return [None] * len(texts), texts
    opened = [tokenizer.decode(p.input_ids[-8:]).rstrip().endswith(OPEN) for p in prompts]  # by the template's header
    pairs = [parted(text, was) for text, was in zip(texts, opened, strict=True)]
    return [reasoning for reasoning, _ in pairs], [answer for _, answer in pairs]


def asked_alone(prompt: Prompt) -> Conversation:
    """A prompt whose earlier answers have no reasoning."""
    return replace(prompt.conversation, messages=without_reasoning(prompt.conversation.messages))


def answers_alone(
    prompts: Sequence[Prompt], texts: Sequence[str], rollout: Rollout, tokenizer: Any, stops: Sequence[int]
) -> Judged:
    """The answers without their reasoning, as text, and as a reward model on the sampler's base was trained to read
    them: each conversation that has reasoning is encoded anew without it, the others are the very tokens that were
    sampled.

    Args:
        texts: what `rollout` says.
        stops: the tokens that end a turn.
    """
    reasoning, read = parted_texts(prompts, texts, tokenizer, hides=True)
    before = []
    after = []
    judged = []
    rows = zip(prompts, texts, read, response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    for prompt, original, text, ids, ended in rows:
        asked = asked_alone(prompt)
        begins = list(prompt.input_ids)
        answers = ids
        if text != original or asked != prompt.conversation:
            encoded = encode_judged(tokenizer, asked, text, ended, stops)
            # A row has a token on either side, and an answer that is nothing but reasoning has none of its own.
            start = min(prompt_length(tokenizer, asked, encoded), len(encoded) - 1)
            begins = encoded[:start]
            answers = encoded[start:]
        judged.append(asked.with_answer(text))
        before.append(begins)
        after.append(answers)
    stripped = rollout_from_answers(before, after, tokenizer.pad_token_id, rollout.tokens_BS.device)
    return Judged(judged, replace(stripped, ended_B=rollout.ended_B), reasoning)


def sample_row(prompt: Conversation, answer: str, reasoning: str | None, **more: Any) -> dict[str, Any]:
    """One line of a run's `samples.jsonl`.

    Args:
        prompt: the whole of it, as the policy was asked.
        answer: as it is judged.
        reasoning: what was taken out of it; None where nothing is hidden.
    """
    hidden = {} if reasoning is None else {"reasoning": reasoning}
    tools = {"tools": prompt.tool_dicts()} if prompt.tools else {}
    return {"prompt": prompt.as_dicts(), **tools, **hidden, "answer": answer, **more}


def empty(text: str) -> bool:
    """Return whether an answer leaves nothing to judge."""
    return not text.strip()


def empty_answers(share: float, hides: bool, whose: str = "") -> list[str]:
    """Return a warning about answers that leave nothing to judge; nothing without such.

    Args:
        share: of the answers.
        hides: their reasoning is hidden.
        whose: with a blank behind it.
    """
    if not share:
        return []
    why = "their reasoning was never closed, or nothing stands behind it" if hides else "they hold no text"
    return [f"{100 * share:.3g}% of the {whose}answers are empty: {why}"]
