"""Messages and tools as files write them, read once for every stage: what they say is kept, or refused by name.

A JSON value of tools, calls and arguments may stand as its text: OpenAI writes arguments so, and tables hold nothing
else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.core.errors import InputError
from align.core.types import ROLES, Message, Tool, ToolCall
from align.data.chat.reasoning import reasoning_length, with_reasoning
from align.data.read.content import split_names
from align.data.read.rows import DECODER, KeyTwice, check_values

LEAVE_OUT = "Leave such rows out."
MEDIA = split_names("images image image_url image_urls audio audios video videos")
NOT_READ = dict.fromkeys(MEDIA, ("images and sound are not read: a model of text answers to text", LEAVE_OUT))
"""Field of a message, or column of a row, that would change what it says → the problem, and the remedy."""
BESIDE_CONTENT = split_names("attachment attachments file files context document documents passage")
NOT_READ_OF_TURNS = NOT_READ | dict.fromkeys(
    BESIDE_CONTENT,
    ("it is not read, and changes what the turn says", "Write it into the content, or leave such rows out."),
)
NOT_READ_OF_ROWS = NOT_READ | {
    "chat_template_kwargs": (
        "arguments of the chat template are those of the whole run",
        "Set data.template_kwargs, and leave the column out.",
    )
}
SYSTEM = ("system", "system_prompt")
"""Columns that hold a system turn beside the conversation, as Alpaca's and OpenOrca's rows do."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold the reasoning in front of an answer: DeepSeek's and vLLM's, OpenRouter's, gpt-oss's."""
TRAINED = ("train", "training", "weight")
"""Fields that say whether a turn is trained on: axolotl's and OpenAI's."""
OFFERED = ("tools", "functions")
"""Columns that hold what the assistant may call: OpenAI's, and its older name."""
CALLS = ("tool_calls", "function_call")
"""Fields of a message that hold calls: OpenAI's, and its older name for one call."""
RESULTS = dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
"""Roles that tools speak in, by OpenAI's two names, ShareGPT's and Llama's → ours."""
NAMES = {**RESULTS, "developer": "system"}
"""Other names of roles → ours. OpenAI calls the system turn `developer` since its reasoning models."""
TEXTS = ("content", "value", "text")
"""Fields that hold what a turn says; of several, all say the same."""
TURN_FIELDS = frozenset(
    ("role", "from", "content", "value", *REASONING, *TRAINED, *CALLS, "tool_call_id", *NOT_READ_OF_TURNS)
)
"""Fields of a turn that are read or refused. Others are metadata."""
PART = ("type", "text", "cache_control")
"""Fields of a content part of text: the last is about the server that answered, not about what is said."""
NOTHING = ("", "[]", "{}", "null")
"""Texts that say nothing, in data sets that keep JSON as text."""
WRITE = "Write a list of {role, content} messages."
WRITE_TOOLS = 'Write [{"type": "function", "function": {"name": "…", "parameters": {…}}}].'
WRITE_CALLS = 'Write [{"type": "function", "function": {"name": "…", "arguments": {…}}}].'
WRITE_ARGUMENTS = 'Write the arguments as an object, such as {"city": "Oslo"}, or as the JSON text of one.'
RESULT = "Write what the tool returned as text, an object as its JSON text."
EMPTY = 'Give its text, leave the row out, or write "train": false on an answer that is not to be imitated.'
KEEP_ONE = "Keep one of the two."
HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
Fields = Mapping[str, Any]
"""Columns of a row, or fields of a message, by name."""


def refused(column: str, value: Any, problem: str, remedy: str) -> InputError:
    """Return the error of a field of a row. Whoever reads the row names the file and the row (`Row.naming_errors`)."""
    return InputError(column, displayed(value), problem, remedy)


def displayed(value: Any) -> str:
    """Return a value as an error shows it, on one line: a text as it stands, if its beginning and end can be seen."""
    plain = isinstance(value, str) and value.isprintable() and value == value.strip() != ""
    text = value if plain else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def says_nothing(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.strip() in NOTHING)


def messages_of(value: Any, column: str) -> tuple[Message, ...]:
    """Return a list of messages, OpenAI's `{role, content}`, checked.

    Args:
        column: for errors to name.

    Raises:
        InputError: it is no such list, or a message says what cannot be kept.
    """
    if not isinstance(value, list) or not value:
        raise refused(column, value, "is no list of messages", WRITE)
    return tuple(message_of(entry, f"{column}[{i}]") for i, entry in enumerate(value))


def message_of(value: Any, column: str) -> Message:
    """Return one message, see `messages_of`."""
    if type(value) is dict and len(value) == 2:  # most messages are: nothing else is said of them
        role = value.get("role")
        content = value.get("content")
        if role in ROLES and type(content) is str:
            return Message(role, content)
    if not isinstance(value, Mapping):
        raise refused(column, value, "is no message", WRITE)
    check_read(value, NOT_READ_OF_TURNS, f"{column}.")
    check_texts(value, column)
    role = value.get("role")
    if isinstance(role, str):
        role = NAMES.get(role, role)
    if role not in ROLES:
        remedy = "Rename the role." if "role" in value else WRITE
        raise refused(f"{column}.role", role, f"is none of {', '.join(ROLES)}", remedy)
    trained = is_trained(value, role, column)
    content = value.get("content")
    if isinstance(content, list):
        content = join_parts(content, f"{column}.content")
    tools = tool_fields(value, role, column)
    if content is None and (not trained or "tool_calls" in tools):
        content = ""
    if not isinstance(content, str):
        problem = "is missing" if content is None else "is no text"
        remedies = {"assistant": EMPTY, "tool": RESULT}
        remedy = remedies.get(role, "Give its text, or leave the row out.")
        raise refused(f"{column}.content", content, problem, remedy)
    return Message(role, add_reasoning(value, role, content, column), trained, **tools)


def tool_fields(message: Fields, role: str, column: str) -> dict[str, Any]:
    """Return the calls of a message, or which call it is the result of; nothing for most.

    Raises:
        InputError: another role than the assistant calls, or another than a tool answers.
    """
    given = [name for name in CALLS if not says_nothing(message.get(name))]
    calls = parse_calls(message, given, column) if given else ()
    if calls and role != "assistant":
        problem = f"stands in a turn of the {role}, and only the assistant calls tools"
        remedy = "Write the role assistant, or leave the calls out."
        raise refused(f"{column}.{given[0]}", calls[0].name, problem, remedy)
    if role == "tool":
        result = {name: message[name] for name in ("tool_call_id", "name") if message.get(name) not in (None, "")}
        for name, value in result.items():
            if not isinstance(value, str):
                raise refused(f"{column}.{name}", value, "is no text", "Give it as text, or leave it out.")
        return result
    if (id := message.get("tool_call_id")) not in (None, ""):
        problem = f"stands in a turn of the {role}, and only results of tools answer calls"
        raise refused(f"{column}.tool_call_id", id, problem, 'Write "role": "tool", or leave it out.')
    return {"tool_calls": calls} if calls else {}


def join_parts(parts: list[Any], column: str) -> str:
    """Return the text of OpenAI's content parts, `{type: text, text: …}`, one behind the other.

    Raises:
        InputError: a part is something else than text.
    """
    for i, part in enumerate(parts):
        text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not text or any(value for name, value in part.items() if name not in PART):
            shown = part.get("type", part) if isinstance(part, Mapping) else part
            problem = "is a list of parts that are not all text"
            raise refused(f"{column}[{i}]", shown, problem, "Leave the row out, or write its text alone.")
    return "".join(part["text"] for part in parts)


def add_reasoning(message: Fields, role: str, content: str, column: str) -> str:
    """Return what a message says, with the reasoning that it has in a field of its own in front of it.

    Raises:
        InputError: that is no text, is not an assistant's, or stands in the content too.
    """
    fields = {name: message[name] for name in REASONING if message.get(name)}
    for name, text in fields.items():
        problem = "is no text" if not isinstance(text, str) else "is reasoning, which only an assistant's turn has"
        if not isinstance(text, str) or role != "assistant":
            raise refused(f"{column}.{name}", text, problem, "Leave it out.")
        other = "the content" if reasoning_length(content) else next((n for n in fields if fields[n] != text), "")
        if other:
            raise refused(f"{column}.{name}", text, f"there is reasoning in {other} too", KEEP_ONE)
    return with_reasoning(content, next(iter(fields.values()))) if fields else content


def is_trained(message: Fields, role: str, column: str) -> bool:
    """Return False for an assistant's turn of which `train` or `weight` says that it is not trained on.

    Raises:
        InputError: a weight between 0 and 1, or a turn of another role that is to be trained on.
    """
    flags = {name: message[name] for name in TRAINED if message.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1):
            problem = "is neither 0 nor 1: a turn is trained on or it is not"
            raise refused(f"{column}.{name}", value, problem, "Write 0 or 1, or false or true.")
        if value == 1 and role != "assistant":
            problem = f"asks to train on a {role} turn, and only what the assistant says is trained on"
            raise refused(f"{column}.{name}", value, problem, "Leave it out.")
    if len({bool(value) for value in flags.values()}) > 1:
        raise refused(column, flags, "contradicts itself", f"Keep one of {', '.join(flags)}.")
    return role != "assistant" or all(flags.values())


def check_weight(row: Fields) -> None:
    """Raise InputError if a row of supervised training asks to count more or less than another. (The pairs of a ranking
    have a weight too, which follows from how many they are.)"""
    if row.keys().isdisjoint(TRAINED):
        return
    for name in TRAINED:
        value = row.get(name)
        number = isinstance(value, int | float)  # `train` may well be a column of text that says something else
        if (number and value != 1) or (name == "weight" and value is not None and not number):
            problem = "weighs a whole row, and rows weigh the same"
            raise refused(name, value, problem, "Leave the row out, or write it twice; weigh turns by 0 or 1.")


def check_texts(turn: Fields, column: str) -> None:
    """Raise InputError if a turn says two things, in two fields."""
    texts = {name: turn[name] for name in TEXTS if isinstance(turn.get(name), str) and turn[name]}
    for name, text in texts.items():
        first = next(iter(texts))
        if text != texts[first]:
            raise refused(f"{column}.{name}", text, f"is another text than that of `{first}`", KEEP_ONE)


def check_read(fields: Fields, names: Mapping[str, tuple[str, str]], prefix: str = "") -> None:
    """Raise InputError if a field says something that is not read.

    Args:
        names: see `NOT_READ`.
    """
    if names.keys().isdisjoint(fields.keys()):
        return
    for name, (problem, remedy) in names.items():
        if not says_nothing(value := fields.get(name)):
            raise refused(f"{prefix}{name}", value, problem, remedy)


def with_system_column(messages: tuple[Message, ...], row: Fields) -> tuple[Message, ...]:
    """Return a conversation with the system turn that its row has in a column of its own.

    Raises:
        InputError: the column holds no text, or the conversation begins with another one.
    """
    for name in SYSTEM:
        text = row.get(name)
        if text in (None, ""):
            continue
        if not isinstance(text, str):
            raise refused(name, text, "is no text", "Give the system prompt as text, or leave it out.")
        if not messages or messages[0].role != "system":
            messages = (Message("system", text), *messages)
        elif messages[0].content != text:
            problem = f"is another system prompt than that of the conversation ({messages[0].content[:60]!r})"
            raise refused(name, text, problem, KEEP_ONE)
    return messages


def as_turns(exchanges: Iterable[Iterable[str]]) -> list[dict[str, str]]:
    """Return the turns of pairs of a question and an answer."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in exchanges for role, text in zip(roles, pair, strict=True)]


def with_default_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Return a conversation with this system turn in front, if it has none of its own."""
    if system is None or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def transcript(text: str) -> tuple[Message, ...]:
    r"""Return the turns of an HH transcript (`\n\nHuman: …`) or a HelpSteer2 one (`<extra_id_1>`); else one user
    turn."""
    roles = {"Human": "user", "User": "user", "Assistant": "assistant"}
    if HH_TURN.match(text.lstrip(" ")):
        _, *parts = HH_TURN.split(text.lstrip(" "))
        return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))
    first, *parts = HELPSTEER_TURN.split(text)
    later = (Message(roles[who], said) for who, said in zip(parts[::2], parts[1::2], strict=True))
    return (Message("user", first), *later)


def value_of(given: Any, column: str) -> Any:
    """Return a JSON value, which may be given as its text; a text that writes none stays.

    Raises:
        InputError: a key stands twice in an object of the text, or it holds what no text can.
    """
    if not isinstance(given, str):
        return given
    try:
        value = DECODER.decode(given)
    except KeyTwice as error:
        raise refused(column, given, f"has the key {error} twice in one object", "Keep one.") from error
    except (ValueError, RecursionError):
        return given
    check_values(value, column)
    return value


def one_of(fields: Fields, given: list[str], column: str) -> Any:
    """Return the value of the one field that says something. Raises InputError if several do."""
    value = fields[given[0]]
    if len(given) > 1:
        raise refused(column, value, f"stands beside {given[1]}", KEEP_ONE)
    return value_of(value, column)


def tools_of(row: Fields) -> tuple[Tool, ...]:
    """Return what a row offers to the assistant.

    Raises:
        InputError: it is no list of schemas, or a name stands twice.
    """
    given = [name for name in OFFERED if not says_nothing(row.get(name))]
    if not given:
        return ()
    column = given[0]
    values = one_of(row, given, column)
    if not isinstance(values, list):
        raise refused(column, row[column], "is no list of tools", WRITE_TOOLS)
    tools = tuple(tool_of(value, f"{column}[{i}]") for i, value in enumerate(values))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise refused(f"{column}[{i}]", name, "is offered twice", KEEP_ONE)
    return tools


def tool_of(given: Any, column: str) -> Tool:
    value = value_of(given, column)
    if isinstance(value, Mapping) and value.get("type", "function") not in ("function", "object", None):
        raise refused(f"{column}.type", value["type"], "is a kind of tools that is not read", WRITE_TOOLS)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise refused(column, given, "is no schema of a tool: it names no function", WRITE_TOOLS)
    for name, kind, wanted in (("parameters", Mapping, "an object"), ("description", str, "a text")):
        if not isinstance(function.get(name), kind | None):
            raise refused(f"{column}.{name}", function[name], f"is not {wanted}", WRITE_TOOLS)
    try:
        return Tool.from_dict(value)
    except ValueError as error:
        raise refused(column, given, f"is no schema of a tool ({error})", WRITE_TOOLS) from error


def parse_calls(message: Fields, given: list[str], column: str) -> tuple[ToolCall, ...]:
    """Return the calls of a message.

    Args:
        given: the fields of the message that hold calls.
    """
    at = f"{column}.{given[0]}"
    value = one_of(message, given, at)
    if given[0] == "function_call" and not isinstance(value, list):
        return (call_of(value, at),)
    if not isinstance(value, list):
        raise refused(at, message[given[0]], "is no list of calls", WRITE_CALLS)
    return tuple(call_of(call, f"{at}[{i}]") for i, call in enumerate(value))


def call_of(given: Any, column: str) -> ToolCall:
    """Return one call: OpenAI's `{id, type, function: {name, arguments}}`, or `{name, arguments}` alone."""
    value = value_of(given, column)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise refused(column, given, "is no call: it names no tool", WRITE_CALLS)
    if value.get("type") not in (None, "function"):
        raise refused(f"{column}.type", value["type"], "is a kind of calls that is not read", WRITE_CALLS)
    id = value.get("id")
    if not isinstance(id, str | None):
        raise refused(f"{column}.id", id, "is no text", "Give the id as text, or leave it out.")
    written = function.get("arguments")
    none = written is None or (isinstance(written, str) and not written.strip())  # OpenAI and vLLM write "" for none
    arguments = {} if none else value_of(written, f"{column}.arguments")
    reason = ""
    if isinstance(arguments, Mapping):
        try:
            return ToolCall.from_arguments(name, arguments, id or "")
        except ValueError as error:
            reason = f" ({error})"
    raise refused(f"{column}.arguments", written, f"is no JSON object{reason}", WRITE_ARGUMENTS)


def check_calls(placed: Sequence[tuple[str, Message]], tools: Iterable[Tool]) -> None:
    """Raise InputError if a result answers no call, a call has no result though the conversation goes on, or a call is
    of no tool that is offered. A last turn of calls is what may be trained on, and needs no results.

    Args:
        placed: the turns of a conversation, each with the place in the row that it, or its text, stands at.
    """
    if not any(turn.tool_calls or turn.role == "tool" for _, turn in placed):  # most have none
        return
    offered = {tool.name for tool in tools}
    waiting = list[ToolCall]()
    place_of_calls = ""

    def check_answered() -> None:
        if waiting:
            call = waiting[0]
            shown = f"{call.name} ({call.id})" if call.id else call.name
            remedy = "Put the result of each call behind it, as a turn of the role tool, or end the row with the calls."
            problem = "has no result, and the conversation goes on"
            raise refused(f"{place_of_calls}.tool_calls", shown, problem, remedy)

    for at, turn in placed:
        place = at.removesuffix(".content").removesuffix(".value")
        if turn.role == "tool":
            waiting.remove(answered_call(turn, waiting, place))
            continue
        check_answered()
        waiting = list(turn.tool_calls)
        place_of_calls = place
        for i, call in enumerate(waiting):
            at = f"{place}.tool_calls[{i}]"
            if offered and call.name not in offered:
                problem = f"calls a tool that is not among those offered ({', '.join(sorted(offered))})"
                raise refused(f"{at}.name", call.name, problem, "Correct the name, or add its schema to tools.")
            if call.id and call.id in [other.id for other in waiting[:i]]:
                raise refused(f"{at}.id", call.id, "is the id of two calls of one turn", "Give each its own.")
    if placed[-1][1].role == "tool":
        check_answered()


def answered_call(turn: Message, waiting: list[ToolCall], place: str) -> ToolCall:
    """Return the call that a result answers: of its id, else the first of its name, else the first."""
    if not waiting:
        problem = "is the result of a tool, and no call stands before it"
        remedy = "Write the call into tool_calls of the answer before it, or leave the row out."
        raise refused(f"{place}.role", "tool", problem, remedy)
    remedy = "Correct {}, or leave it out."
    if turn.tool_call_id:
        calls = [call for call in waiting if call.id == turn.tool_call_id]
        if not calls:
            ids = ", ".join(call.id for call in waiting if call.id) or "none has an id"
            problem = f"is the id of no call that waits for a result ({ids})"
            raise refused(f"{place}.tool_call_id", turn.tool_call_id, problem, remedy.format("it"))
    else:
        calls = [call for call in waiting if turn.name in ("", call.name)]
    if not calls or turn.name not in ("", calls[0].name):
        problem = f"is the name of no tool whose result is due ({', '.join(call.name for call in calls or waiting)})"
        raise refused(f"{place}.name", turn.name, problem, remedy.format("the name"))
    return calls[0]
