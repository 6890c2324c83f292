"""Reasoning at the beginning of an answer, and its removal.

Reasoning models write it as `<think>…</think>` in front of the answer (DeepSeek-R1, Qwen3). APIs return it in another
field (`reasoning_content`). Here it is part of the text of an answer. Some templates write `<think>` in the generation
prompt, so that the answer contains only `</think>`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from align.core.types import Conversation, Message

OPEN = "<think>"
CLOSE = "</think>"
REST = rf"(?:(?!{CLOSE}).)*{CLOSE}\s*"
SPAN = re.compile(rf"\s*{OPEN}{REST}", re.DOTALL)
"""The reasoning at the beginning of an answer, with the white space after it."""
BEHIND_HEADER = re.compile(REST, re.DOTALL)
"""The reasoning at the beginning of an answer whose `<think>` is in the generation prompt."""


def measure_reasoning(answer: str, begins_in_reasoning: bool = False) -> int:
    """Return the number of characters of the `<think>` reasoning at the beginning of an answer, with its tags. Returns
    0 if none exists.

    Args:
        begins_in_reasoning: whether `<think>` is in the generation prompt. If not, `</think>` alone is ordinary text.
    """
    match = (BEHIND_HEADER if begins_in_reasoning else SPAN).match(answer)
    return match.end() if match else 0


def prepend_reasoning(answer: str, reasoning: str) -> str:
    """Return an answer with `reasoning` put in front, in `<think>` tags."""
    return f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n\n{answer}"


def split_reasoning(text: str, begins_in_reasoning: bool = False) -> tuple[str, str]:
    """Split an answer into its `<think>` reasoning, without the tags, and the text after it.

    If the reasoning is not closed, the rest is empty.

    Args:
        begins_in_reasoning: whether `<think>` is in the generation prompt.
    """
    has_reasoning = begins_in_reasoning or text.lstrip().startswith(OPEN)
    end = len(text) if has_reasoning and CLOSE not in text else measure_reasoning(text, begins_in_reasoning)
    return text[:end].replace(OPEN, "").replace(CLOSE, "").strip(), text[end:]


def strip_reasoning(text: str, begins_in_reasoning: bool = False) -> str:
    """Return the text of an answer after its `<think>` reasoning, see `split_reasoning`."""
    return split_reasoning(text, begins_in_reasoning)[1]


def strip_all_reasoning(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages with the `<think>` reasoning removed from all answers. Answers that were nothing but
    reasoning are excluded from the loss."""
    return tuple(strip_message_reasoning(message) if message.role == "assistant" else message for message in messages)


def strip_message_reasoning(message: Message) -> Message:
    content = message.content
    answer = strip_reasoning(content) if OPEN in content or CLOSE in content else content
    is_trained = message.trained and bool(answer.strip() or message.tool_calls)
    if answer == content and is_trained == message.trained:
        return message
    return replace(message, content=answer, trained=is_trained)


class LostReasoning(NamedTuple):
    """Two flags: a chat template left out the reasoning of the last answer, and of any earlier answer."""

    of_last_answer: bool
    of_earlier_answer: bool


def find_lost_reasoning(conversation: Conversation, rendered: str) -> LostReasoning:
    """Return whether a conversation's rendering lacks the reasoning of the last answer, and of any earlier answer.

    Answers that are not trained on are not considered.

    Args:
        rendered: the rendered conversation.
    """
    answers = [message for message in conversation.messages if message.role == "assistant"]
    lost: list[bool] = []
    end = len(rendered)
    # From the last answer to the first, so that equal reasoning of two answers is not found twice in one place.
    for answer in reversed(answers):
        size = measure_reasoning(answer.content)
        reasoning = answer.content[:size].replace(OPEN, "").replace(CLOSE, "").strip()
        if reasoning and answer.trained:
            answer_start = rendered.rfind(answer.content[size:].strip(), 0, end)
            end = answer_start if answer_start >= 0 else end
            reasoning_start = rendered.rfind(reasoning, 0, end)
            end = reasoning_start if reasoning_start >= 0 else end
            lost.append(reasoning_start < 0)
        else:
            lost.append(False)
    return LostReasoning(any(lost[:1]), any(lost[1:]))
