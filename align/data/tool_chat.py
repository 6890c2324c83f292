"""Chats as templates write them, in which an assistant may call tools: for training and for the server alike.

What people, tools, calls and descriptions say is data, as in `align.data.tokens`: no text of theirs becomes a special
token. A chat of the server gives the tokens that `align.data.chat.prompt_ids` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.data.render_deadline import render_deadline
from align.data.tokens import Veil, special_texts, tokenised, veiled_texts
from align.errors import InputError, half_character, require
from align.types import Conversation, Message, Tool

Messages = Sequence[Mapping[str, Any]]
"""As chat templates read them: `role`, `content`, an assistant's `tool_calls` with `arguments` as an object, and a
tool's `tool_call_id`."""
Tools = Sequence[Mapping[str, Any]]
"""`{"type": "function", "function": {name, description, parameters}}`."""
PROBE = ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}},)
FIXED = ("role", "type")
"""Fields whose words a template compares with its own. A word of letters alone is left as it is there."""


def tool_prompt_ids(tokenizer: Any, messages: Messages, tools: Tools = ()) -> list[int]:
    """The chat as tokens, the header of the answer included.

    Raises:
        InputError: the template refuses it, or a name in it spells out a special token.
    """
    chat, veil = veiled_json(tokenizer, {"messages": list(messages), "tools": list(tools)})
    return tokenised(tokenizer, rendered(tokenizer, chat["messages"], chat["tools"]), veil).ids


def written(tokenizer: Any, messages: Messages, tools: Tools | None, answer_due: bool) -> str:
    """What the chat template writes. It is a program of the model's, and may raise anything.

    Raises:
        ValueError: it writes half a character.
        RenderDeadline: it does not end in time.
    """
    with render_deadline():
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools or ()) or None, tokenize=False, add_generation_prompt=answer_due
        )
    if half := half_character(text):
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
    """Whether the chat template writes tools into the prompt."""
    asked = [{"role": "user", "content": "a"}]
    try:
        return rendered(tokenizer, asked, PROBE) != rendered(tokenizer, asked, ())
    except InputError:
        return False


def veiled(tokenizer: Any, conversation: Conversation) -> tuple[Conversation, Veil]:
    """The conversation with its texts veiled, see `align.data.tokens.veiled_texts`; of one with tools, those of calls
    and schemas too.

    Raises:
        InputError: a key of arguments or of a schema spells out a special token.
    """
    turns = conversation.messages
    if not conversation.uses_tools:
        texts, veil = veiled_texts(tokenizer, [m.content for m in turns])
        return conversation if not veil else replace(
            conversation, messages=tuple(replace(m, content=text) for m, text in zip(turns, texts, strict=True))
        ), veil  # fmt: skip
    said = {"messages": conversation.as_dicts(), "tools": conversation.tool_dicts() or []}
    chat, veil = veiled_json(tokenizer, said)
    messages = (replace(Message.of(made), trained=m.trained) for made, m in zip(chat["messages"], turns, strict=True))
    return replace(conversation, messages=tuple(messages), tools=tuple(map(Tool.of, chat["tools"]))), veil


def veiled_json(tokenizer: Any, value: Any) -> tuple[Any, Veil]:
    """A JSON value with each text in it veiled, see `veiled_texts`; the keys of objects stay.

    Raises:
        InputError: a key spells out a special token.
    """
    texts, specials = list[str](), special_texts(tokenizer)
    gather(value, texts, specials)
    hidden, veil = veiled_texts(tokenizer, texts)
    return (filled(value, iter(hidden), specials) if veil else value), veil


def gather(value: Any, texts: list[str], specials: Sequence[str]) -> None:
    """Adds the texts of a JSON value, in order."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            found = next((special for special in specials if special in key), None)
            require(found is None, "tools", key, "is a name with a special token in it", "Choose another name.")
            if not fixed(key, inner, specials):
                gather(inner, texts, specials)
    elif isinstance(value, Sequence):
        for inner in value:
            gather(inner, texts, specials)


def fixed(key: str, value: Any, specials: Sequence[str]) -> bool:
    word = key in FIXED and isinstance(value, str) and value.isidentifier()
    return word and not any(special in value for special in specials)


def filled(value: Any, texts: Iterator[str], specials: Sequence[str]) -> Any:
    """The value with these texts in place of its own, in the order of `gather`."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {k: v if fixed(k, v, specials) else filled(v, texts, specials) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [filled(inner, texts, specials) for inner in value]
    return value
