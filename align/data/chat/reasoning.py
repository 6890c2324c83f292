"""The reasoning that an answer begins with: kept, masked or hidden in training, and hidden from whoever judges.

Reasoning models write it as `<think>…</think>` in front of the answer (DeepSeek-R1, Qwen3); APIs hand it over in a
field of its own (`reasoning_content`). Here it is text at the beginning of an answer. Some templates open the block in
the header of the turn, so that the answer has its end alone.
"""

from __future__ import annotations

import re
from dataclasses import replace

from align.core.types import Conversation, Message

OPEN, CLOSE = "<think>", "</think>"
REST = rf"(?:(?!{CLOSE}).)*{CLOSE}\s*"
SPAN, BEHIND_HEADER = re.compile(rf"\s*{OPEN}{REST}", re.DOTALL), re.compile(REST, re.DOTALL)
"""From the beginning of an answer to the end of its reasoning, the blanks behind it included."""


def reasoning_length(answer: str, opened: bool = False) -> int:
    """Characters that an answer spends on reasoning; 0 where it has none.

    Args:
        opened: the header of the turn opens the block. Without, an answer may speak of `</think>` and mean it.
    """
    found = (BEHIND_HEADER if opened else SPAN).match(answer)
    return found.end() if found else 0


def with_reasoning(answer: str, reasoning: str) -> str:
    """An answer with its reasoning in front of it."""
    return f"{OPEN}\n{reasoning.strip()}\n{CLOSE}\n\n{answer}"


def parted(text: str, opened: bool = False) -> tuple[str, str]:
    """The reasoning that an answer begins with, without its tags, and the answer alone. Reasoning that is never closed
    leaves no answer.

    Args:
        opened: the header of the turn opens the block.
    """
    begun = opened or text.lstrip().startswith(OPEN)
    end = len(text) if begun and CLOSE not in text else reasoning_length(text, opened)
    return text[:end].replace(OPEN, "").replace(CLOSE, "").strip(), text[end:]


def answer_alone(text: str, opened: bool = False) -> str:
    """An answer without its reasoning, see `parted`."""
    return parted(text, opened)[1]


def without_reasoning(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Messages whose answers have no reasoning. One that was nothing else is not trained on."""
    return tuple(alone(message) if message.role == "assistant" else message for message in messages)


def alone(message: Message) -> Message:
    content = message.content
    answer = answer_alone(content) if OPEN in content or CLOSE in content else content
    trained = message.trained and bool(answer.strip() or message.tool_calls)
    if answer == content and trained == message.trained:
        return message
    return replace(message, content=answer, trained=trained)


def lost_reasoning(conversation: Conversation, rendered: str) -> tuple[bool, bool]:
    """Whether a chat template left out reasoning of answers that are trained on.

    Args:
        rendered: the conversation as the template writes it.

    Returns:
        whether the last answer lost its own, and whether an earlier one did.
    """
    answers = [message for message in conversation.messages if message.role == "assistant"]
    lost, end = [], len(rendered)
    for answer in reversed(answers):  # so that a thought that two answers had is the later one's
        size = reasoning_length(answer.content)
        thought = answer.content[:size].replace(OPEN, "").replace(CLOSE, "").strip()
        if thought and answer.trained:
            at = rendered.rfind(answer.content[size:].strip(), 0, end)
            end = at if at >= 0 else end
            found = rendered.rfind(thought, 0, end)
            end = found if found >= 0 else end
            lost.append(found < 0)
        else:
            lost.append(False)
    return any(lost[:1]), any(lost[1:])
