"""Messages as files write them, read once for every stage: what they say is kept, or refused by name; never dropped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.data.reasoning import reasoning_length, with_reasoning
from align.data.records.refusals import refused
from align.data.records.tools import CALLS, RESULTS, calls_of, result_of, says_nothing
from align.types import ROLES, Message

PARTS = "images and sound are not read: a model of text answers to text"
NOT_READ: Mapping[str, str] = dict.fromkeys(
    ("images", "image", "image_url", "image_urls", "audio", "audios", "video", "videos"), PARTS
)
"""Fields of a message, and columns of a row, that would change what it says."""
BESIDE_CONTENT = "it is not read, and changes what the turn says"
NOT_READ_OF_TURNS: Mapping[str, str] = {
    **NOT_READ,
    **dict.fromkeys(
        ("attachment", "attachments", "file", "files", "context", "document", "documents", "passage"), BESIDE_CONTENT
    ),
}
NOT_READ_OF_ROWS: Mapping[str, str] = {
    **NOT_READ,
    "chat_template_kwargs": "arguments of the chat template are those of the whole run",
}
"""Fields of a row that would change what its conversation says."""
IN_CONTENT = "Write it into the content, or leave such rows out."
REMEDIES = {
    "chat_template_kwargs": "Set data.template_kwargs, and leave the column out.",
    **dict.fromkeys(("attachment", "attachments", "file", "files"), IN_CONTENT),
    **dict.fromkeys(("context", "document", "documents", "passage"), IN_CONTENT),
}
"""For what has another remedy than to leave the row out."""
SYSTEM = ("system", "system_prompt")
"""Columns that hold a system turn beside the conversation, as Alpaca's and OpenOrca's rows do."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold the reasoning in front of an answer: DeepSeek's and vLLM's, OpenRouter's, gpt-oss's."""
TRAINED = ("train", "training", "weight")
"""Fields that say whether a turn is trained on: axolotl's and OpenAI's."""
WRITE = "Write a list of {role, content} messages."
NAMES = {**RESULTS, "developer": "system"}
"""Other names of roles → ours. OpenAI calls the system turn `developer` since its reasoning models."""
TEXTS = ("content", "value", "text")
"""Fields that hold what a turn says; of several, all say the same."""
TURN_FIELDS = frozenset(
    {"role", "from", "content", "value", *REASONING, *TRAINED, *CALLS, "tool_call_id", *NOT_READ_OF_TURNS}
)
"""Fields of a turn that are read or refused. Others are metadata."""
PART = ("type", "text", "cache_control")
"""Fields of a content part of text: the last is about the server that answered, not about what is said."""
RESULT = "Write what the tool returned as text, an object as its JSON text."
NOT_THEIRS = "Write the role assistant, or leave the calls out."
HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
EMPTY = 'Give its text, leave the row out, or write "train": false on an answer that is not to be imitated.'


def messages_of(value: Any, where: str, column: str) -> tuple[Message, ...]:
    """A list of messages, OpenAI's `{role, content}`, checked.

    Args:
        where: file and row, for errors to name; so is `column`.

    Raises:
        InputError: it is no such list, or a message says what cannot be kept.
    """
    if not isinstance(value, list) or not value:
        raise refused(where, column, value, "is no list of messages", WRITE)
    return tuple(message_of(one, where, f"{column}[{i}]") for i, one in enumerate(value))


def message_of(value: Any, where: str, column: str) -> Message:
    """One message, see `messages_of`."""
    if type(value) is dict and len(value) == 2:  # most messages are: nothing else is said of them
        role, content = value.get("role"), value.get("content")
        if role in ROLES and type(content) is str:
            return Message(role, content)
    if not isinstance(value, Mapping):
        raise refused(where, column, value, "is no message", WRITE)
    check_read(value, NOT_READ_OF_TURNS, where, f"{column}.")
    check_texts(value, where, column)
    role, content = value.get("role"), value.get("content")
    role = NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        remedy = "Rename the role." if "role" in value else WRITE
        raise refused(where, f"{column}.role", role, f"is none of {', '.join(ROLES)}", remedy)
    trained = trained_on(value, str(role), where, column)
    if isinstance(content, list):
        content = joined(content, where, f"{column}.content")
    said = tools_said(value, str(role), where, column)
    if content is None and (not trained or "tool_calls" in said):
        content = ""
    if not isinstance(content, str):
        problem = "is missing" if content is None else "is no text"
        remedy = EMPTY if role == "assistant" else "Give its text, or leave the row out."
        remedy = RESULT if role == "tool" else remedy
        raise refused(where, f"{column}.content", content, problem, remedy)
    return Message(str(role), with_reasoning_field(value, str(role), content, where, column), trained, **said)


def tools_said(message: Mapping[str, Any], role: str, where: str, column: str) -> dict[str, Any]:
    """The calls of a message, or which call it is the result of; nothing for most.

    Raises:
        InputError: somebody calls who is not the assistant, or answers who is no tool.
    """
    calls = calls_of(message, where, column)
    if calls and role != "assistant":
        problem = f"stands in a turn of the {role}, and only the assistant calls tools"
        raise refused(where, f"{column}.{next(n for n in CALLS if message.get(n))}", calls[0].name, problem, NOT_THEIRS)
    if role == "tool":
        return result_of(message, where, column)
    if (id := message.get("tool_call_id")) not in (None, ""):
        problem = f"stands in a turn of the {role}, and only results of tools answer calls"
        raise refused(where, f"{column}.tool_call_id", id, problem, 'Write "role": "tool", or leave it out.')
    return {"tool_calls": calls} if calls else {}


def joined(parts: list[Any], where: str, column: str) -> str:
    """The text of OpenAI's content parts, `{type: text, text: …}`, one behind the other.

    Raises:
        InputError: a part is something else than text.
    """
    for i, part in enumerate(parts):
        text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not text or any(value for name, value in part.items() if name not in PART):
            problem, remedy = "is a list of parts that are not all text", "Leave the row out, or write its text alone."
            shown = part.get("type") if isinstance(part, Mapping) and "type" in part else part
            raise refused(where, f"{column}[{i}]", shown, problem, remedy)
    return "".join(part["text"] for part in parts)


def with_reasoning_field(message: Mapping[str, Any], role: str, content: str, where: str, column: str) -> str:
    """What a message says, with the reasoning that it has in a field of its own in front of it.

    Raises:
        InputError: that is no text, nobody's answer, or stands in the content too.
    """
    said = {name: message[name] for name in REASONING if message.get(name)}
    for name, text in said.items():
        problem = "is no text" if not isinstance(text, str) else "is reasoning, which only an assistant's turn has"
        if not isinstance(text, str) or role != "assistant":
            raise refused(where, f"{column}.{name}", text, problem, "Leave it out.")
        if reasoning_length(content) or len(set(map(str, said.values()))) > 1:
            other = "in the content" if reasoning_length(content) else f"in {next(o for o in said if o != name)}"
            raise refused(where, f"{column}.{name}", text, f"there is reasoning {other} too", "Keep one of the two.")
    return with_reasoning(content, next(iter(said.values()))) if said else content


def trained_on(message: Mapping[str, Any], role: str, where: str, column: str) -> bool:
    """False for an assistant's turn of which `train` or `weight` says that it is not trained on.

    Raises:
        InputError: a weight between 0 and 1, or a turn of somebody else's that is to be trained on.
    """
    assistant, said = role == "assistant", {name: message[name] for name in TRAINED if message.get(name) is not None}
    for name, value in said.items():
        if value not in (0, 1):
            problem = "is neither 0 nor 1: a turn is trained on or it is not"
            raise refused(where, f"{column}.{name}", value, problem, "Write 0 or 1, or false or true.")
        if value == 1 and not assistant:
            problem = f"asks to train on a {role} turn, and only what the assistant says is trained on"
            raise refused(where, f"{column}.{name}", value, problem, "Leave it out.")
    if len({bool(value) for value in said.values()}) > 1:
        raise refused(where, column, said, "contradicts itself", f"Keep one of {', '.join(said)}.")
    return not assistant or all(said.values())


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises: InputError: the row says something of its conversation that cannot be kept."""
    check_read(row, NOT_READ_OF_ROWS, where)


def check_weight(row: Mapping[str, Any], where: str) -> None:
    """Raises: InputError: a row of supervised training asks to count more or less than another. (The pairs of a ranking
    have a weight too, which follows from how many they are.)"""
    if row.keys().isdisjoint(TRAINED):
        return
    for name in TRAINED:
        value = row.get(name)
        number = isinstance(value, int | float)  # `train` may well be a column of text that says something else
        if (number and value != 1) or (name == "weight" and value is not None and not number):
            problem = "weighs a whole row, and rows weigh the same"
            raise refused(where, name, value, problem, "Leave the row out, or write it twice; weigh turns by 0 or 1.")


def check_texts(turn: Mapping[str, Any], where: str, column: str) -> None:
    """Raises: InputError: a turn says two things, in two fields."""
    texts = {name: turn[name] for name in TEXTS if isinstance(turn.get(name), str) and turn[name]}
    for name, text in texts.items():
        first = next(iter(texts))
        if text != texts[first]:
            problem = f"is another text than that of `{first}`"
            raise refused(where, f"{column}.{name}", text, problem, "Keep one of the two.")


def check_read(given: Mapping[str, Any], names: Mapping[str, str], where: str, prefix: str = "") -> None:
    if names.keys().isdisjoint(given.keys()):
        return
    for name, problem in names.items():
        value = given.get(name)
        if not says_nothing(value):
            remedy = REMEDIES.get(name, "Leave such rows out.")
            raise refused(where, f"{prefix}{name}", value, problem, remedy)


def with_system_column(messages: tuple[Message, ...], row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """A conversation with the system turn that its row has in a column of its own.

    Raises:
        InputError: the column holds no text, or the conversation begins with another one.
    """
    said = {name: row[name] for name in SYSTEM if row.get(name) not in (None, "")}
    for name, text in said.items():
        if not isinstance(text, str):
            raise refused(where, name, text, "is no text", "Give the system prompt as text, or leave it out.")
        if messages and messages[0].role == "system":
            if messages[0].content != text:
                problem = f"is another system prompt than that of the conversation ({messages[0].content[:60]!r})"
                raise refused(where, name, text, problem, "Keep one of the two.")
        else:
            messages = (Message("system", text), *messages)
    return messages


def with_default_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """A conversation with this system turn in front, where it has none of its own."""
    if system is None or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def transcript(text: str) -> tuple[Message, ...]:
    r"""The turns of an HH transcript (`\n\nHuman: …`) or a HelpSteer2 one (`<extra_id_1>`); else one user turn."""
    if HH_TURN.match(text.lstrip(" ")):
        _, *parts = HH_TURN.split(text.lstrip(" "))
        roles = {"Human": "user", "Assistant": "assistant"}
        return tuple(Message(roles[who], content.strip()) for who, content in zip(parts[::2], parts[1::2], strict=True))
    first, *parts = HELPSTEER_TURN.split(text)
    later = (Message(who.lower(), content) for who, content in zip(parts[::2], parts[1::2], strict=True))
    return (Message("user", first), *later)
