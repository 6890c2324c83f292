"""Answers in the form that a judge or reward model reads: complete, or with their reasoning removed.

If reasoning is hidden, the reasoning of earlier turns is removed too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from align.core.types import Conversation, Rollout
from align.data.chat.encode import Prompt, count_prompt_tokens, encode_for_reward_model, find_stop_token_ids
from align.data.chat.reasoning import OPEN, split_reasoning, strip_all_reasoning
from align.models.forward import rollout_from_answers
from align.rollout.engine import extract_response_ids


class JudgedAnswers(NamedTuple):
    """Conversations with their answers as a judge or reward model reads them, as messages and as tokens.

    Attributes:
        conversations: the prompts with the answers.
        rollout: the same as tokens.
        reasoning: the removed reasoning of each answer; None for each if reasoning is not hidden.
    """

    conversations: list[Conversation]
    rollout: Rollout
    reasoning: Sequence[str | None]


def read_whole_answers(prompts: Sequence[Prompt], texts: Sequence[str], rollout: Rollout) -> JudgedAnswers:
    """Return the prompts with their complete answers, reasoning included, for a judge or reward model."""
    conversations = [p.conversation.with_answer(text) for p, text in zip(prompts, texts, strict=True)]
    return JudgedAnswers(conversations, rollout, [None] * len(texts))


def choose_answer_reader(hides_reasoning: bool, tokenizer: Any, generation_config: Any) -> Callable[..., JudgedAnswers]:
    """Return the function that builds a judge's input from prompts and answers, with or without the reasoning.

    Args:
        hides_reasoning: whether answers are judged without their reasoning (`rollout.reasoning=hide`).
    """
    if not hides_reasoning:
        return read_whole_answers
    return partial(
        read_answers_without_reasoning, tokenizer=tokenizer, stops=find_stop_token_ids(tokenizer, generation_config)
    )


class SplitAnswers(NamedTuple):
    """The reasoning of each answer, or None if it has none or was not split off, and the rest of each answer."""

    reasoning: Sequence[str | None]
    answers: Sequence[str]


def split_reasoning_batch(
    prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Any, hides_reasoning: bool
) -> SplitAnswers:
    """Split each answer into its reasoning and the text after it, if `hides_reasoning` is True.

    The text is empty if the reasoning never ended. Returns None for each reasoning, and the unchanged answers, if
    `hides_reasoning` is False.
    """
    if not hides_reasoning:
        return SplitAnswers([None] * len(texts), texts)
    # Some templates open the reasoning in the header of the answer.
    opens_reasoning = [tokenizer.decode(p.input_ids[-8:]).rstrip().endswith(OPEN) for p in prompts]
    pairs = [split_reasoning(text, is_open) for text, is_open in zip(texts, opens_reasoning, strict=True)]
    return SplitAnswers([reasoning for reasoning, _ in pairs], [answer for _, answer in pairs])


def strip_prompt_reasoning(prompt: Prompt) -> Conversation:
    """Return a prompt's conversation with the reasoning removed from its assistant messages."""
    return replace(prompt.conversation, messages=strip_all_reasoning(prompt.conversation.messages))


def read_answers_without_reasoning(
    prompts: Sequence[Prompt], texts: Sequence[str], rollout: Rollout, tokenizer: Any, stops: Sequence[int]
) -> JudgedAnswers:
    """Remove the reasoning from prompts and answers, and return them as conversations and as tokens.

    Conversations with reasoning are encoded again without it, as in the training of reward models; the others keep the
    sampled tokens.

    Args:
        texts: the answers of `rollout` as text.
        stops: tokens that end a turn.
    """
    reasoning, stripped_texts = split_reasoning_batch(prompts, texts, tokenizer, hides_reasoning=True)
    all_prompt_ids = []
    all_answer_ids = []
    conversations = []
    rows = zip(prompts, texts, stripped_texts, extract_response_ids(rollout), rollout.ended_B.tolist(), strict=True)
    for prompt, original, text, response, has_stop_token in rows:
        conversation = strip_prompt_reasoning(prompt)
        prompt_ids = list(prompt.input_ids)
        answer_ids = response
        if text != original or conversation != prompt.conversation:
            encoded = encode_for_reward_model(tokenizer, conversation, text, has_stop_token, stops)
            # Both sides need at least one token, and an answer of nothing but reasoning has none left.
            start = min(count_prompt_tokens(tokenizer, conversation, encoded), len(encoded) - 1)
            prompt_ids = encoded[:start]
            answer_ids = encoded[start:]
        conversations.append(conversation.with_answer(text))
        all_prompt_ids.append(prompt_ids)
        all_answer_ids.append(answer_ids)
    stripped = rollout_from_answers(all_prompt_ids, all_answer_ids, tokenizer.pad_token_id, rollout.tokens_BS.device)
    return JudgedAnswers(conversations, replace(stripped, ended_B=rollout.ended_B), reasoning)


def build_sample_row(prompt: Conversation, answer: str, reasoning: str | None, **more: Any) -> dict[str, Any]:
    """Build a row of a run's `samples.jsonl` from a prompt and its answer.

    Args:
        prompt: the complete prompt of the policy.
        answer: the answer in the form that is judged.
        reasoning: its removed reasoning; None if reasoning is not hidden.
        more: further fields of the row.
    """
    hidden = {} if reasoning is None else {"reasoning": reasoning}
    tools = {"tools": prompt.tool_dicts()} if prompt.tools else {}
    return {"prompt": prompt.as_dicts(), **tools, **hidden, "answer": answer, **more}


def is_empty_answer(text: str) -> bool:
    """Return whether an answer is empty or only whitespace."""
    return not text.strip()


def warn_about_empty_answers(empty_share: float, hides_reasoning: bool, whose: str = "") -> list[str]:
    """Return a list with a warning if some answers are empty, or an empty list otherwise.

    Args:
        empty_share: share of the empty answers.
        hides_reasoning: whether reasoning is hidden.
        whose: adjective for the answers, followed by a space.
    """
    if not empty_share:
        return []
    reason = "their reasoning was not closed, or no text follows it" if hides_reasoning else "they hold no text"
    return [f"{100 * empty_share:.3g}% of the {whose}answers are empty: {reason}"]
