"""Whether a chat template writes all that a conversation with tools says, found by letting it write one like it.

Templates leave out what their model does not know: tools that are offered, a second call of a turn, the text beside a
call. Training would then read another conversation than the row, and nobody would be told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from align.data.tool_chat import written
from align.errors import InputError
from align.types import Conversation, Message, Tool, ToolCall

CHATML = "Use data.template=chatml, which writes it, or a model whose chat template does."
WITHOUT = "Leave it out of the rows, use data.template=chatml, which writes it, or a model whose chat template does."
MOST = 4096
"""Forms of conversations that are remembered of a tokenizer."""

_kept: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def check_keeps(tokenizer: Any, conversation: Conversation) -> None:
    """Raises:
    InputError: the template leaves out something of a conversation with tools. Names the model, and what it is.
    """
    if not conversation.uses_tools:
        return
    form = (tokenizer.chat_template, bool(conversation.tools), *map(form_of, conversation.messages))
    kept = _kept.setdefault(tokenizer, set())
    if form in kept:
        return
    marked, marks = marked_like(conversation)
    try:
        text = written(tokenizer, marked.as_dicts(), marked.tool_dicts(), answer_due=False)
    except Exception:  # whoever renders the conversation itself says what it refuses
        return
    for mark, place, what, remedy in marks:
        if mark not in text:
            model = getattr(tokenizer, "name_or_path", "") or "the model"
            problem = f"the chat template of {model} leaves out {what}"
            raise InputError(f"{conversation.id or 'conversation'}, {place}", what, problem, remedy)
    if len(kept) >= MOST:
        kept.clear()
    kept.add(form)


def form_of(turn: Message) -> tuple[Any, ...]:
    """What a template may go by, whatever the turn says."""
    calls = tuple(len(call.id) for call in turn.tool_calls)
    return turn.role, bool(turn.content.strip()), calls, len(turn.tool_call_id), bool(turn.name)


Mark = tuple[str, str, str, str]
"""A word that no template has, the place that it marks, what stands there, and the remedy where it is left out."""


def marked_like(conversation: Conversation) -> tuple[Conversation, list[Mark]]:
    """A conversation of the same form whose texts are marks."""
    marks, words = list[Mark](), (f"xq{n}qx" for n in count())

    def marked(place: str, what: str, remedy: str = CHATML) -> str:
        marks.append((word := next(words), place, what, remedy))
        return word

    tools = tuple(
        Tool.of({"name": marked("tools", "the tools that are offered"), "parameters": {"type": "object"}})
        for _ in conversation.tools[:1]
    )
    turns = tuple(turn_marked(turn, f"messages[{i}]", marked) for i, turn in enumerate(conversation.messages))
    return replace(conversation, messages=turns, tools=tools), marks


def turn_marked(turn: Message, place: str, marked: Any) -> Message:
    what = {"tool": "results of tools", "assistant": "the text of an answer"}.get(turn.role, f"{turn.role} turns")
    content = turn.content
    if content.strip():
        beside = "the text beside a call" if turn.tool_calls else what
        content = marked(f"{place}.content", beside, WITHOUT if turn.tool_calls else CHATML)
    return replace(turn, content=content, tool_calls=tuple(calls_marked(turn, place, marked)))


def calls_marked(turn: Message, place: str, marked: Any) -> Iterator[ToolCall]:
    for i, call in enumerate(turn.tool_calls):
        what = f"call {i + 1} of a turn" if i else "calls of tools"
        at = f"{place}.tool_calls[{i}]"
        yield ToolCall.of(marked(at, what), {"argument": marked(f"{at}.arguments", what)}, call.id)
