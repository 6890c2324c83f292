"""Scores of conversations by reward models, which are adapters of the bank like any other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.data.chat.encode import encode_judged
from align.data.chat.reasoning import answer_alone, with_reasoning, without_reasoning
from align.rollout.requests import Output
from align.serve.errors import invalid, unsupported
from align.serve.prompts import ChatFormat, Prompt, text_of
from align.serve.request_log import Record
from align.serve.schemas import ChatMessage, RewardBody

Json = dict[str, Any]


def reward_prompts(form: ChatFormat, body: RewardBody, alone: bool, context: int) -> list[Prompt]:
    """Each conversation as the reward model read those of its training.

    Args:
        alone: it was trained on answers without their reasoning.
        context: tokens that the base reads.

    Raises:
        Refusal: a conversation ends with no answer, holds what is no text, or is too long.
    """
    found, several = [], len(body.conversations) > 1 or isinstance(body.messages[0], list)
    for i, messages in enumerate(body.conversations):
        where = f"messages.{i}" if several else "messages"
        read = tuple(as_judged(message, f"{where}.{j}") for j, message in enumerate(messages))
        if len(read) < 2 or read[-1].role != "assistant":
            raise invalid(where, "A conversation ends with the answer that is scored, behind what it answers.")
        before, answer = (without_reasoning(read[:-1]), answer_alone(read[-1].content)) if alone else (
            read[:-1], read[-1].content
        )  # fmt: skip
        try:
            ids = encode_judged(form.tokenizer, Conversation(before), answer, True, form.stop_ids)
        except InputError as error:
            raise invalid(where, f"{error.problem}. {error.remedy}") from error
        if len(ids) > context:
            raise invalid(where, f"The context is {context} tokens, and the conversation has {len(ids)}.")
        found.append(Prompt(tuple(ids)))
    return found


def as_judged(message: ChatMessage, where: str) -> Message:
    role = "system" if message.role == "developer" else message.role
    if role == "tool" or message.tool_calls:
        raise unsupported(where, "Reward models read no tools.")
    text = text_of(message.content, f"{where}.content")
    if not text:
        raise invalid(f"{where}.content", "A message needs content.")
    if role == "assistant" and message.reasoning_content:
        text = with_reasoning(text, message.reasoning_content)
    return Message(role, text)


class Rewards:
    """The scores of one request, see `align.serve.answers.Answers`; they come whole."""

    def __init__(self, record: Record, prompts: Sequence[Prompt]) -> None:
        self.record, self.prompts = record, prompts
        self.scores: list[float | None] = [None] * len(prompts)

    def first(self) -> Iterator[Json]:
        yield from ()

    def take(self, i: int, output: Output) -> Iterator[Json]:
        if output.finish_reason is not None:
            self.scores[i] = output.score
            self.record.finish_reasons.append(output.finish_reason)
        yield from ()

    def whole(self) -> Json:
        tokens = self.record.prompt_tokens
        return {
            "id": self.record.id.replace("req", "reward", 1), "object": "list", "model": self.record.answered,
            "data": [{"object": "reward", "index": i, "reward": score} for i, score in enumerate(self.scores)],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }  # fmt: skip

    def usage_chunk(self) -> Json:
        return {}
