"""An answer in its parts while it is written: reasoning, what is said, and calls of tools.

Reasoning is what stands between `<think>` and `</think>` at the beginning, as `align.data.chat.reasoning` parts it. A
call of a tool is JSON with `name` and `arguments` (or `parameters`), between `<tool_call>` and `</tool_call>` (Hermes,
Qwen) or as the whole answer (Llama 3). JSON that calls none of the tools offered is text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from align.data.chat.reasoning import CLOSE, OPEN
from align.rollout.detokenize import beginning_at_end

CALL, CALLED = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Attributes:
    arguments: JSON.
    """

    name: str
    arguments: str
    id: str

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Part(NamedTuple):
    """A piece of an answer: text of one kind, or a call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class PartedAnswer:
    """Parts the text of an answer as it comes.

    Args:
        opened: the prompt ends with `<think>`.
        tools: names of the tools that were offered.
        most_calls: further ones are left out.

    Attributes:
        calls: how many calls were found.
    """

    def __init__(self, opened: bool = False, tools: Collection[str] = (), most_calls: int | None = None) -> None:
        self.tools, self.most_calls, self.calls = tools, most_calls, 0
        self._state: Literal["start", "opened", "reasoning", "between", "behind", "content", "call", "json"]
        self._state, self._text = "opened" if opened else "start", ""

    def take(self, text: str, last: bool = False) -> list[Part]:
        """The parts that are sure with this text.

        Args:
            last: nothing follows.
        """
        if self._state == "content" and not self.tools:  # nothing more can come of it
            return [Part("content", text)] if text else []
        self._text += text
        parts, before = [], None
        while before != (self._state, self._text):
            before = self._state, self._text
            parts += getattr(self, f"_{self._state}")(last)
        return joined(parts)

    def _start(self, last: bool) -> Iterator[Part]:
        """Before anything is known."""
        begun = self._text.lstrip()
        if begun.startswith(OPEN):
            self._state, self._text = "opened", begun.removeprefix(OPEN)
        elif last or not OPEN.startswith(begun):
            self._state = "behind"
        yield from ()

    def _opened(self, last: bool) -> Iterator[Part]:
        """Before the first word of the reasoning: blanks are nobody's."""
        self._text = self._text.lstrip()
        if self._text:
            self._state = "reasoning"
        yield from ()

    def _reasoning(self, last: bool) -> Iterator[Part]:
        thought, closed, behind = self._text.partition(CLOSE)
        if closed:
            self._state, self._text = "between", behind
            yield Part("reasoning", thought.rstrip())
        elif last:
            self._text = ""
            yield Part("reasoning", thought.rstrip())
        else:
            # Blanks before the end belong to it.
            kept = max(beginning_at_end(thought, CLOSE), len(thought) - len(thought.rstrip()))
            bare = thought[: len(thought) - kept]
            sure = len(bare.rstrip()) if kept else len(bare)
            self._text = thought[sure:]
            yield Part("reasoning", thought[:sure])

    def _between(self, last: bool) -> Iterator[Part]:
        """Behind the reasoning: blanks are nobody's."""
        self._text = self._text.lstrip()
        if self._text:
            self._state = "behind"
        yield from ()

    def _behind(self, last: bool) -> Iterator[Part]:
        """At the beginning of what is said."""
        begun = self._text.lstrip()
        if not begun and not last:
            return
        self._state = "json" if self.tools and begun[:1] in ("{", "[") else "content"
        yield from ()

    def _content(self, last: bool) -> Iterator[Part]:
        said, called, behind = self._text.partition(CALL) if self.tools else (self._text, "", "")
        if called:
            self._state, self._text = "call", behind
            yield from self._said(said.rstrip())
            return
        # Blanks before a call are not said.
        kept = 0 if last or not self.tools else max(beginning_at_end(said, CALL), len(said) - len(said.rstrip()))
        sure = len(said) - kept if not kept else len(said[: len(said) - kept].rstrip())
        self._text = said[sure:]
        yield from self._said(said[:sure])

    def _call(self, last: bool) -> Iterator[Part]:
        inside, closed, behind = self._text.partition(CALLED)
        if closed or last:
            calls = calls_in(inside, self.tools)
            self._state, self._text = "content", behind.lstrip() if calls else behind
            yield from self._made(calls) if calls else self._said(f"{CALL}{inside}{closed}")

    def _json(self, last: bool) -> Iterator[Part]:
        """The answer may be a call and nothing else."""
        if last:
            calls, text = calls_in(self._text, self.tools), self._text
            self._state, self._text = "content", ""
            yield from self._made(calls) if calls else self._said(text)

    def _said(self, text: str) -> Iterator[Part]:
        if text:
            yield Part("content", text)

    def _made(self, calls: list[ToolCall]) -> Iterator[Part]:
        for call in calls:
            if self.most_calls is None or self.calls < self.most_calls:
                self.calls += 1
                yield Part("call", call=call)


def joined(parts: list[Part]) -> list[Part]:
    """Texts of one kind in a row as one; none that is empty."""
    made: list[Part] = []
    for part in parts:
        if part.call is None and made and made[-1].kind == part.kind:
            made[-1] = Part(part.kind, made[-1].text + part.text)
        elif part.text or part.call:
            made.append(part)
    return made


def calls_in(text: str, tools: Collection[str]) -> list[ToolCall]:
    """The calls that a text is; none where it is anything else, or calls what was not offered."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [call_of(one, tools) for one in (found if isinstance(found, list) else [found])]
    return [] if None in calls else [call for call in calls if call]


def call_of(value: Any, tools: Collection[str]) -> ToolCall | None:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or value.get("name") not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], written, f"call_{secrets.token_hex(12)}")
