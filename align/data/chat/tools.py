"""Rendering of chats with tools, for training and for the server.

No text of a message, a call or a schema becomes a special token, see `align.data.chat.tokens`. The server's
`encode_tool_prompt` and `align.data.chat.encode.encode_prompt` return the same tokens for the same chat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from align.core.errors import InputError, find_lone_surrogate, require
from align.core.types import Conversation, Message, Tool, ToolCall, dump_json
from align.data.chat.render_deadline import render_deadline
from align.data.chat.tokens import EscapeTable, Span, escape_texts, get_special_texts, tokenize_rendered

Messages = Sequence[Mapping[str, Any]]
"""Messages in the form that chat templates read: `role`, `content`, an assistant's `tool_calls` with `arguments` as an
object, and a tool's `tool_call_id`."""
Tools = Sequence[Mapping[str, Any]]
"""Tool schemas, `{"type": "function", "function": {name, description, parameters}}`."""
PROBE = ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},)
FIXED = ("role", "type")
"""Fields whose values a template compares with constants. A value that is an identifier is not escaped there."""


def encode_tool_prompt(tokenizer: Any, messages: Messages, tools: Tools = ()) -> list[int]:
    """Return the token ids of messages and tool schemas, rendered with the chat template and the generation prompt.

    Raises:
        InputError: the template refuses the chat, or a key in it spells out a special token.
    """
    chat, escapes = escape_json(tokenizer, {"messages": list(messages), "tools": list(tools)})
    return tokenize_rendered(tokenizer, render_messages(tokenizer, chat["messages"], chat["tools"]), escapes).ids


def apply_template(tokenizer: Any, messages: Messages, tools: Tools | None, add_generation_prompt: bool) -> str:
    """Return messages as text, rendered with the chat template within a time limit. The template may raise any
    exception.

    Args:
        add_generation_prompt: add the generation prompt.

    Raises:
        ValueError: the text has a lone surrogate.
        RenderDeadline: the template does not end in time.
    """
    with render_deadline():
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools or ()) or None, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    if surrogate := find_lone_surrogate(text):
        raise ValueError(f"it writes {surrogate}, half a character")
    return text


def render_messages(tokenizer: Any, messages: Messages, tools: Tools) -> str:
    """Return messages and tool schemas as text, rendered with the chat template and the generation prompt.

    Raises:
        InputError: the template refuses the chat.
    """
    try:
        return apply_template(tokenizer, messages, tools, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        roles = ", ".join(str(message["role"]) for message in messages[-6:])
        problem = f"the chat template refuses it ({type(error).__name__}: {str(error)[:200]})"
        raise InputError("messages", roles, problem, "Use the roles in the order the template wants.") from error


def supports_tools(tokenizer: Any) -> bool:
    """Return whether the tokenizer's chat template writes tools into the prompt, judged by rendering with and without a
    tool. Returns False if it refuses the test message."""
    messages = [{"role": "user", "content": "a"}]
    try:
        return render_messages(tokenizer, messages, PROBE) != render_messages(tokenizer, messages, ())
    except InputError:
        return False


def escape_conversation(tokenizer: Any, conversation: Conversation) -> tuple[Conversation, EscapeTable]:
    """Escape special tokens in a conversation's texts, tool calls and tool schemas, so that they are tokenized as plain
    text.

    Returns:
        the conversation, and the table that reverts the replacement, see `align.data.chat.tokens.escape_texts`.

    Raises:
        InputError: a key of arguments or of a schema spells out a special token.
    """
    turns = conversation.messages
    if not conversation.uses_tools:
        texts, escapes = escape_texts(tokenizer, [turn.content for turn in turns])
        if escapes:
            messages = tuple(replace(turn, content=text) for turn, text in zip(turns, texts, strict=True))
            conversation = replace(conversation, messages=messages)
        return conversation, escapes
    chat = {"messages": conversation.as_dicts(), "tools": conversation.tool_dicts() or []}
    chat, escapes = escape_json(tokenizer, chat)
    messages = tuple(
        replace(Message.from_dict(message), trained=turn.trained)
        for message, turn in zip(chat["messages"], turns, strict=True)
    )
    return replace(conversation, messages=messages, tools=tuple(map(Tool.from_dict, chat["tools"]))), escapes


def escape_json(tokenizer: Any, value: Any) -> tuple[Any, EscapeTable]:
    """Escape special tokens in all strings of a JSON value, so that they are tokenized as plain text, see
    `escape_texts`. Returns the value and the table that reverts the replacement. The keys of objects stay.

    Raises:
        InputError: a key spells out a special token.
    """
    texts: list[str] = []
    specials = get_special_texts(tokenizer)

    def collect(text: str) -> str:
        texts.append(text)
        return text

    replace_texts(value, collect, specials)
    escaped, escapes = escape_texts(tokenizer, texts)
    if escapes:
        remaining = iter(escaped)
        value = replace_texts(value, lambda text: next(remaining), specials)
    return value, escapes


def replace_texts(value: Any, change: Callable[[str], str], special_texts: Sequence[str]) -> Any:
    """Return a copy of a JSON value with `change` applied to each of its strings, in order. Identifiers in `FIXED`
    fields stay.

    Raises:
        InputError: a key spells out one of the special tokens.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        fields: dict[str, Any] = {}
        for key, inner in value.items():
            is_plain = not any(special in key for special in special_texts)
            require(is_plain, "tools", key, "is a name with a special token in it", "Choose another name.")
            is_constant = key in FIXED and isinstance(inner, str) and inner.isidentifier()
            is_constant = is_constant and not any(special in inner for special in special_texts)
            fields[key] = inner if is_constant else replace_texts(inner, change, special_texts)
        return fields
    if isinstance(value, Sequence):
        return [replace_texts(inner, change, special_texts) for inner in value]
    return value


CHATML_REMEDY = "Use data.template=chatml, which writes it, or a model whose chat template does."
LEAVE_OUT_REMEDY = (
    "Leave it out of the rows, use data.template=chatml, which writes it, or a model whose chat template does."
)
MAX_SHAPES = 4096
"""Maximum number of cached shapes per tokenizer."""

_checked_shapes: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def check_tools_rendered(tokenizer: Any, conversation: Conversation) -> None:
    """Raise InputError if the chat template leaves out a part of a conversation with tools.

    The check depends only on the shape of the conversation, and its result is cached.
    """
    if not conversation.uses_tools:
        return
    shape = (tokenizer.chat_template, bool(conversation.tools), *map(get_turn_shape, conversation.messages))
    checked_shapes = _checked_shapes.setdefault(tokenizer, set())
    if shape in checked_shapes:
        return
    marked, marks = build_marked_copy(conversation)
    try:
        text = apply_template(tokenizer, marked.as_dicts(), marked.tool_dicts(), add_generation_prompt=False)
    except Exception:  # it is reported where the conversation itself is rendered
        return
    for mark in marks:
        if mark.word not in text:
            model = getattr(tokenizer, "name_or_path", "") or "the model"
            problem = f"the chat template of {model} leaves out {mark.content}"
            raise InputError(f"{conversation.id or 'conversation'}, {mark.field}", mark.content, problem, mark.remedy)
    if len(checked_shapes) >= MAX_SHAPES:
        checked_shapes.clear()
    checked_shapes.add(shape)


def get_turn_shape(turn: Message) -> tuple[Any, ...]:
    """Return the properties of a message, apart from its texts, on which the output of a chat template may depend."""
    id_lengths = tuple(len(call.id) for call in turn.tool_calls)
    return turn.role, bool(turn.content.strip()), id_lengths, len(turn.tool_call_id), bool(turn.name)


class Mark(NamedTuple):
    """A made-up word in place of a text, to see whether a template writes that text.

    Attributes:
        word: it is in no template.
        field: the field that it stands in.
        content: description of the content of the field.
        remedy: what to do if the template leaves it out.
    """

    word: str
    field: str
    content: str
    remedy: str


def build_marked_copy(conversation: Conversation) -> tuple[Conversation, list[Mark]]:
    """Return a copy of a conversation with each text replaced by a made-up word, and the list of these words."""
    marks: list[Mark] = []
    words = (f"xq{n}qx" for n in count())

    def add_mark(field: str, content: str, remedy: str = CHATML_REMEDY) -> str:
        mark = Mark(next(words), field, content, remedy)
        marks.append(mark)
        return mark.word

    tools = tuple(
        Tool.from_dict({"name": add_mark("tools", "the tools that are offered"), "parameters": {"type": "object"}})
        for _ in conversation.tools[:1]
    )
    turns: list[Message] = []
    for i, turn in enumerate(conversation.messages):
        field = f"messages[{i}]"
        content = turn.content
        if content.strip():
            if turn.tool_calls:
                content = add_mark(f"{field}.content", "the text beside a call", LEAVE_OUT_REMEDY)
            else:
                descriptions = {"tool": "results of tools", "assistant": "the text of an answer"}
                content = add_mark(f"{field}.content", descriptions.get(turn.role, f"{turn.role} turns"))
        calls: list[ToolCall] = []
        for number, call in enumerate(turn.tool_calls):
            call_field = f"{field}.tool_calls[{number}]"
            description = f"call {number + 1} of a turn" if number else "calls of tools"
            name = add_mark(call_field, description)
            arguments = {"argument": add_mark(f"{call_field}.arguments", description)}
            calls.append(ToolCall.from_arguments(name, arguments, call.id))
        turns.append(replace(turn, content=content, tool_calls=tuple(calls)))
    return replace(conversation, messages=tuple(turns), tools=tools), marks


def find_calls_span(
    render: Callable[..., str],
    conversation: Conversation,
    turn_index: int,
    text: str,
    answer_end: str,
    special_texts: Sequence[str],
) -> Span | None:
    """Return the character span, in the rendered text, of the assistant turn `turn_index`, which calls tools. It covers
    the turn's text, its calls and the token that ends it.

    Returns None if the template does not allow to locate it.

    Args:
        render: renders a conversation; with `add_generation_prompt=True`, with the generation prompt.
        text: the rendered conversation.
        answer_end: the text that the template writes after an answer without calls.
        special_texts: the texts of the special tokens, longest first.
    """
    mark = next(mark for n in count() if (mark := f"\ue000calls {n}\ue001") not in text)
    turn = conversation.messages[turn_index]
    *others, last = turn.tool_calls
    turn = replace(turn, tool_calls=(*others, replace(last, arguments=dump_json({mark: mark}))))
    changed = replace(
        conversation, messages=(*conversation.messages[:turn_index], turn, *conversation.messages[turn_index + 1 :])
    )
    tail = render(changed).rpartition(mark)[2]
    last_tail = render(changed.turns(turn_index + 1)).rpartition(mark)[2]
    tail_length = len(find_common_prefix(text[::-1], tail[::-1]))
    last_tail = last_tail[len(tail) - tail_length :]
    tail = tail[len(tail) - tail_length :]
    end_length = measure_calls_end(find_common_prefix(tail, last_tail), answer_end, special_texts)
    end = len(text) - tail_length + end_length
    if turn_index == 0:
        return None
    prompt = render(conversation.turns(turn_index), add_generation_prompt=True)
    if len(prompt) <= end and text.startswith(prompt):
        return len(prompt), end
    # Later turns may change the text before this turn, but not the turn itself.
    up_to_turn = render(conversation.turns(turn_index + 1))
    up_to_turn = up_to_turn[: len(up_to_turn) - len(last_tail) + end_length]
    if up_to_turn.startswith(prompt) and text[:end].endswith(up_to_turn[len(prompt) :]):
        return end - (len(up_to_turn) - len(prompt)), end
    return None


def measure_calls_end(tail: str, answer_end: str, special_texts: Sequence[str]) -> int:
    """Return the number of characters after a turn's tool calls that end the turn, such as `<|im_end|>`.

    They reach to the special token that ends answers, else to the first special token. Without a special token they are
    the whole tail but for the white space at its end.

    Args:
        tail: the text that the template writes after the arguments of the last call, whether or not turns follow.
        answer_end: the text that the template writes after an answer without calls.
    """
    stripped = answer_end.lstrip()
    ends = [special for special in special_texts if stripped.startswith(special) and special in tail]
    candidates = [special for special in ends or special_texts if special in tail]
    if not candidates:
        return len(tail.rstrip())
    first = min(candidates, key=lambda special: (tail.find(special), -len(special)))
    return tail.find(first) + len(first)


def find_common_prefix(first: str, second: str) -> str:
    """Return the longest common prefix of two texts."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[: next(differing, min(len(first), len(second)))]
