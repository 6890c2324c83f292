"""The text of an answer, split into reasoning, content and tool calls.

Reasoning is the text between `<think>` and `</think>` at the beginning, as in `align.data.chat.reasoning`. A tool call
is JSON with `name` and `arguments` (or `parameters`), between `<tool_call>` and `</tool_call>` (Hermes, Qwen) or as the
whole answer (Llama 3). JSON that calls a tool which was not offered is content.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from align.data.chat.reasoning import CLOSE, OPEN
from align.rollout.detokenize import count_prefix_at_end
from align.serve.prompts import CALL_END, CALL_START


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model made in its answer.

    Attributes:
        arguments: JSON.
    """

    name: str
    arguments: str
    id: str

    def as_dict(self) -> dict[str, Any]:
        """Return the call as an entry of `tool_calls` in OpenAI's form of a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class AnswerPart(NamedTuple):
    """A piece of an answer: text of one kind, or a tool call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class AnswerParser:
    """A parser that splits the text of an answer into reasoning, content and tool calls while it is generated.

    Args:
        begins_in_reasoning: whether the prompt ends with `<think>`, so that the answer begins with reasoning.
        tools: names of the offered tools.
        max_calls: maximum number of calls; further ones are dropped.

    Attributes:
        calls: number of calls so far.
    """

    def __init__(
        self, begins_in_reasoning: bool = False, tools: Collection[str] = (), max_calls: int | None = None
    ) -> None:
        self.tools = tools
        self.max_calls = max_calls
        self.calls = 0
        self._state = "opened" if begins_in_reasoning else "start"
        self._text = ""

    def feed(self, text: str, is_last: bool = False) -> list[AnswerPart]:
        """Add the next text of an answer, and return the parts that can be sent now.

        Args:
            is_last: whether this is the end of the answer.
        """
        if self._state == "content" and not self.tools:  # the rest of the answer is content
            return [AnswerPart("content", text)] if text else []
        self._text += text
        parts = list[AnswerPart]()
        while (next_parts := self._advance(is_last)) is not None:
            parts += next_parts
        return join_parts(parts)

    def _advance(self, is_last: bool) -> list[AnswerPart] | None:
        """Consume buffered text up to the next state, and return its complete parts, or None if more text is needed."""
        text = self._text
        stripped = text.lstrip()
        match self._state:
            case "start":  # reasoning may open
                if stripped.startswith(OPEN):
                    return self._enter_state("opened", stripped.removeprefix(OPEN))
                return self._enter_state("answer", text) if is_last or not OPEN.startswith(stripped) else None
            case "opened" | "closed":  # whitespace around the reasoning is dropped
                self._text = stripped
                if not stripped:
                    return None
                return self._enter_state("reasoning" if self._state == "opened" else "answer", stripped)
            case "reasoning":
                reasoning, closing_tag, remainder = text.partition(CLOSE)
                if closing_tag:
                    return self._enter_state("closed", remainder, [AnswerPart("reasoning", reasoning.rstrip())])
                length = len(reasoning.rstrip()) if is_last else count_sendable_characters(reasoning, CLOSE)
                if not length:
                    return None
                return self._enter_state("reasoning", reasoning[length:], [AnswerPart("reasoning", reasoning[:length])])
            case "answer":  # the whole answer may be a call in JSON
                if not stripped and not is_last:
                    return None
                return self._enter_state("json" if self.tools and stripped[:1] in ("{", "[") else "content", text)
            case "json":
                if not is_last:
                    return None
                return self._enter_state("content", "", self._take_calls(text) or [AnswerPart("content", text)])
            case "call":
                call_text, closing_tag, remainder = text.partition(CALL_END)
                if not closing_tag and not is_last:
                    return None
                if parts := self._take_calls(call_text):
                    return self._enter_state("content", remainder.lstrip(), parts)
                return self._enter_state(
                    "content", remainder, [AnswerPart("content", f"{CALL_START}{call_text}{closing_tag}")]
                )
            case _:
                content, opening_tag, remainder = text.partition(CALL_START) if self.tools else (text, "", "")
                if opening_tag:
                    return self._enter_state("call", remainder, [AnswerPart("content", content.rstrip())])
                length = len(content) if is_last or not self.tools else count_sendable_characters(content, CALL_START)
                if not length:
                    return None
                return self._enter_state("content", content[length:], [AnswerPart("content", content[:length])])

    def _enter_state(self, state: str, text: str, parts: Sequence[AnswerPart] = ()) -> list[AnswerPart]:
        self._state = state
        self._text = text
        return [*parts]

    def _take_calls(self, text: str) -> list[AnswerPart]:
        """Parse a text as tool calls, count them in `calls`, and return a part for each one up to `max_calls` in all.

        Returns an empty part if all its calls are beyond the maximum, and no parts if the text is not a call.
        """
        calls = parse_tool_calls(text, self.tools)
        if not calls:
            return []
        if self.max_calls is not None:
            calls = calls[: max(0, self.max_calls - self.calls)]
        self.calls += len(calls)
        return [AnswerPart("call", call=call) for call in calls] or [AnswerPart("content")]


def count_sendable_characters(text: str, tag: str) -> int:
    """Return the number of leading characters of a text that can be sent before the text after it is known.

    A possible beginning of `tag` at its end, and the whitespace before that, have to wait.
    """
    pending = max(count_prefix_at_end(text, tag), len(text) - len(text.rstrip()))
    return len(text[: len(text) - pending].rstrip()) if pending else len(text)


def join_parts(parts: list[AnswerPart]) -> list[AnswerPart]:
    """Merge consecutive text parts of one kind, and drop empty parts."""
    merged: list[AnswerPart] = []
    for part in parts:
        if part.call is None and merged and merged[-1].kind == part.kind:
            merged[-1] = AnswerPart(part.kind, merged[-1].text + part.text)
        elif part.text or part.call:
            merged.append(part)
    return merged


def parse_tool_calls(text: str, tools: Collection[str]) -> list[ToolCall]:
    """Parse a text as JSON of one or more tool calls, or return [] if it is anything else or calls an unknown tool."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [parse_tool_call(item, tools) for item in (value if isinstance(value, list) else [value])]
    return [] if None in calls else [call for call in calls if call]


def parse_tool_call(value: Any, tools: Collection[str]) -> ToolCall | None:
    """Convert a JSON value to a tool call with a new random id, or return None if it calls none of the `tools`."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or value.get("name") not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], arguments_text, f"call_{secrets.token_hex(12)}")
