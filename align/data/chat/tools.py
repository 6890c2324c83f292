"""Chats as templates write them, in which an assistant may call tools: for training and for the server alike.

What people, tools, calls and descriptions say is data, as in `align.data.chat.tokens`: no text of theirs becomes a
special token. A chat of the server gives the tokens that `align.data.chat.encode.prompt_ids` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from align.core.errors import InputError, find_lone_surrogate, require
from align.core.types import Conversation, Message, Tool, ToolCall, dump_json
from align.data.chat.render_deadline import render_deadline
from align.data.chat.tokens import Span, Veil, special_texts, tokenised, veiled_texts

Messages = Sequence[Mapping[str, Any]]
"""As chat templates read them: `role`, `content`, an assistant's `tool_calls` with `arguments` as an object, and a
tool's `tool_call_id`."""
Tools = Sequence[Mapping[str, Any]]
"""`{"type": "function", "function": {name, description, parameters}}`."""
PROBE = ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},)
FIXED = ("role", "type")
"""Fields whose words a template compares with its own. A word of letters alone is left as it is there."""


def tool_prompt_ids(tokenizer: Any, messages: Messages, tools: Tools = ()) -> list[int]:
    """Return the chat as tokens, the header of the answer included.

    Raises:
        InputError: the template refuses it, or a name in it spells out a special token.
    """
    chat, veil = veiled_json(tokenizer, {"messages": list(messages), "tools": list(tools)})
    return tokenised(tokenizer, rendered(tokenizer, chat["messages"], chat["tools"]), veil).ids


def written(tokenizer: Any, messages: Messages, tools: Tools | None, answer_due: bool) -> str:
    """Return what the chat template writes. It is a program of the model's, and may raise anything.

    Raises:
        ValueError: it writes half a character.
        RenderDeadline: it does not end in time.
    """
    with render_deadline():
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools or ()) or None, tokenize=False, add_generation_prompt=answer_due
        )
    if half := find_lone_surrogate(text):
        raise ValueError(f"it writes {half}, half a character")
    return text


def rendered(tokenizer: Any, messages: Messages, tools: Tools) -> str:
    try:
        return written(tokenizer, messages, tools, answer_due=True)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of the model's
        roles = ", ".join(str(message["role"]) for message in messages[-6:])
        problem = f"the chat template refuses it ({type(error).__name__}: {str(error)[:200]})"
        raise InputError("messages", roles, problem, "Use the roles in the order the template wants.") from error


def takes_tools(tokenizer: Any) -> bool:
    """Return whether the chat template writes tools into the prompt."""
    asked = [{"role": "user", "content": "a"}]
    try:
        return rendered(tokenizer, asked, PROBE) != rendered(tokenizer, asked, ())
    except InputError:
        return False


def veiled(tokenizer: Any, conversation: Conversation) -> tuple[Conversation, Veil]:
    """Return the conversation with its texts veiled, see `align.data.chat.tokens.veiled_texts`; of one with tools,
    those of calls and schemas too.

    Raises:
        InputError: a key of arguments or of a schema spells out a special token.
    """
    turns = conversation.messages
    if not conversation.uses_tools:
        texts, veil = veiled_texts(tokenizer, [m.content for m in turns])
        return conversation if not veil else replace(
            conversation, messages=tuple(replace(m, content=text) for m, text in zip(turns, texts, strict=True))
        ), veil
    said = {"messages": conversation.as_dicts(), "tools": conversation.tool_dicts() or []}
    chat, veil = veiled_json(tokenizer, said)
    messages = (
        replace(Message.from_dict(made), trained=m.trained) for made, m in zip(chat["messages"], turns, strict=True)
    )
    return replace(conversation, messages=tuple(messages), tools=tuple(map(Tool.from_dict, chat["tools"]))), veil


def veiled_json(tokenizer: Any, value: Any) -> tuple[Any, Veil]:
    """Return a JSON value with each text in it veiled, see `veiled_texts`; the keys of objects stay.

    Raises:
        InputError: a key spells out a special token.
    """
    texts = list[str]()
    specials = special_texts(tokenizer)

    def collect(text: str) -> str:
        texts.append(text)
        return text

    replace_texts(value, collect, specials)
    hidden, veil = veiled_texts(tokenizer, texts)
    again = iter(hidden)
    return (replace_texts(value, lambda text: next(again), specials) if veil else value), veil


def replace_texts(value: Any, change: Callable[[str], str], specials: Sequence[str]) -> Any:
    """Return a JSON value with each of its texts changed, in order. Words of `FIXED` fields stay.

    Raises:
        InputError: a key spells out one of the special tokens.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        fields = dict[str, Any]()
        for key, inner in value.items():
            is_name = not any(special in key for special in specials)
            require(is_name, "tools", key, "is a name with a special token in it", "Choose another name.")
            is_word = key in FIXED and isinstance(inner, str) and inner.isidentifier()
            stays = is_word and not any(special in inner for special in specials)
            fields[key] = inner if stays else replace_texts(inner, change, specials)
        return fields
    if isinstance(value, Sequence):
        return [replace_texts(inner, change, specials) for inner in value]
    return value


CHATML = "Use data.template=chatml, which writes it, or a model whose chat template does."
WITHOUT = "Leave it out of the rows, use data.template=chatml, which writes it, or a model whose chat template does."
MOST = 4096
"""Forms of conversations that are remembered of a tokenizer."""

_kept: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def check_keeps(tokenizer: Any, conversation: Conversation) -> None:
    """Raise InputError if the template leaves out something of a conversation with tools: it names the model, and what
    is left out."""
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
    """Return what a template may go by, whatever the turn says."""
    calls = tuple(len(call.id) for call in turn.tool_calls)
    return turn.role, bool(turn.content.strip()), calls, len(turn.tool_call_id), bool(turn.name)


Mark = tuple[str, str, str, str]
"""A word that no template has, the place that it marks, what stands there, and the remedy where it is left out."""


def marked_like(conversation: Conversation) -> tuple[Conversation, list[Mark]]:
    """Return a conversation of the same form whose texts are marks."""
    marks = list[Mark]()
    words = (f"xq{n}qx" for n in count())

    def marked(place: str, what: str, remedy: str = CHATML) -> str:
        marks.append((word := next(words), place, what, remedy))
        return word

    tools = tuple(
        Tool.from_dict({"name": marked("tools", "the tools that are offered"), "parameters": {"type": "object"}})
        for _ in conversation.tools[:1]
    )
    turns = list[Message]()
    for i, turn in enumerate(conversation.messages):
        place = f"messages[{i}]"
        content = turn.content
        if content.strip():
            what = {"tool": "results of tools", "assistant": "the text of an answer"}.get(
                turn.role, f"{turn.role} turns"
            )
            beside = "the text beside a call" if turn.tool_calls else what
            content = marked(f"{place}.content", beside, WITHOUT if turn.tool_calls else CHATML)
        calls = list[ToolCall]()
        for number, call in enumerate(turn.tool_calls):
            at = f"{place}.tool_calls[{number}]"
            what = f"call {number + 1} of a turn" if number else "calls of tools"
            calls.append(
                ToolCall.from_arguments(marked(at, what), {"argument": marked(f"{at}.arguments", what)}, call.id)
            )
        turns.append(replace(turn, content=content, tool_calls=tuple(calls)))
    return replace(conversation, messages=tuple(turns), tools=tools), marks


def span_of_calls(
    render: Callable[..., str],
    conversation: Conversation,
    i: int,
    text: str,
    behind_answer: str,
    specials: Sequence[str],
) -> Span | None:
    """Return where the assistant wrote turn `i`: its text, its calls, and the token that ends it. None if unknown.

    Args:
        render: a conversation as the template writes it; with `answer_due=True`, up to the header of an answer.
        text: this conversation as the template writes it.
        behind_answer: what the template writes behind an answer without calls.
        specials: the texts of the special tokens, longest first.
    """
    mark = next(mark for n in count() if (mark := f"\ue000calls {n}\ue001") not in text)
    turn = conversation.messages[i]
    *others, last = turn.tool_calls
    turn = replace(turn, tool_calls=(*others, replace(last, arguments=dump_json({mark: mark}))))
    changed = replace(conversation, messages=(*conversation.messages[:i], turn, *conversation.messages[i + 1 :]))
    rest, alone = (render(one).rpartition(mark)[2] for one in (changed, changed.turns(i + 1)))
    closing = len(common_beginning(text[::-1], rest[::-1]))
    rest, alone = rest[len(rest) - closing :], alone[len(rest) - closing :]
    closed = end_of_calls(common_beginning(rest, alone), behind_answer, specials)
    end = len(text) - closing + closed
    before = render(conversation.turns(i), answer_due=True) if i else ""
    if i and len(before) <= end and text.startswith(before):
        return len(before), end
    written = render(conversation.turns(i + 1))
    written = written[: len(written) - len(alone) + closed]  # up to the end of the turn
    if i and written.startswith(before) and text[:end].endswith(written[len(before) :]):
        return end - (len(written) - len(before)), end  # what is before it changes with what follows, but not the turn
    return None


def end_of_calls(closing: str, behind_answer: str, specials: Sequence[str]) -> int:
    """Return how many characters end a turn of calls: up to the special token that ends answers; else to the first one;
    else all, without blanks.

    Args:
        closing: what the template writes behind the arguments of the last call, whether or not turns follow.
    """
    behind = behind_answer.lstrip()
    ends = [special for special in specials if behind.startswith(special) and special in closing]
    found = [(closing.find(special), special) for special in ends or specials if special in closing]
    if not found:
        return len(closing.rstrip())
    at, special = min(found, key=lambda one: (one[0], -len(one[1])))
    return at + len(special)


def common_beginning(one: str, other: str) -> str:
    """Return the longest text that both begin with."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differs, min(len(one), len(other)))]
