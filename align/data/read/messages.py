"""Parsers of messages, tools and tool calls, shared by all stages. Fields that cannot be kept are refused by name.

Tools, calls and arguments may be given as JSON text: OpenAI writes arguments so, and CSV files hold nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.core.errors import InputError
from align.core.types import ROLES, Message, Tool, ToolCall
from align.data.chat.reasoning import measure_reasoning, prepend_reasoning
from align.data.read.content import split_names
from align.data.read.json_rows import DECODER, DuplicateKeyError, check_json_values

LEAVE_OUT_HELP = "Leave such rows out."
MEDIA_FIELDS = split_names("images image image_url image_urls audio audios video videos")
UNSUPPORTED_FIELDS = dict.fromkeys(
    MEDIA_FIELDS, ("images and sound are not supported: models read text only", LEAVE_OUT_HELP)
)
"""Message field or column that is not read but changes the meaning of a row → (problem, remedy)."""
ATTACHMENT_FIELDS = split_names("attachment attachments file files context document documents passage")
UNSUPPORTED_TURN_FIELDS = UNSUPPORTED_FIELDS | dict.fromkeys(
    ATTACHMENT_FIELDS,
    ("it is not read, and changes what the turn says", "Write it into the content, or leave such rows out."),
)
UNSUPPORTED_COLUMNS = UNSUPPORTED_FIELDS | {
    "chat_template_kwargs": (
        "arguments of the chat template apply to the whole run, not to one row",
        "Set data.template_kwargs, and leave the column out.",
    )
}
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that hold the system prompt beside the conversation, as in Alpaca and OpenOrca."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold the reasoning before an answer, as named by DeepSeek and vLLM, OpenRouter, gpt-oss."""
TRAIN_FLAGS = ("train", "training", "weight")
"""Fields that say whether a turn is trained on, as named by axolotl and OpenAI."""
TOOL_COLUMNS = ("tools", "functions")
"""Columns that hold the available tools: OpenAI's current and older name."""
CALL_FIELDS = ("tool_calls", "function_call")
"""Message fields that hold tool calls: OpenAI's current name, and the older one for a single call."""
RESULT_ROLES = dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
"""Roles of tool results, as named by OpenAI (two names), ShareGPT and Llama → `tool`."""
ROLE_ALIASES = {**RESULT_ROLES, "developer": "system"}
"""Other names of roles → ours. OpenAI's reasoning models call the system turn `developer`."""
TEXT_FIELDS = ("content", "value", "text")
"""Fields that hold the text of a turn. If there are several, their texts must be equal."""
TURN_FIELDS = frozenset(
    (
        "role",
        "from",
        "content",
        "value",
        *REASONING_FIELDS,
        *TRAIN_FLAGS,
        *CALL_FIELDS,
        "tool_call_id",
        *UNSUPPORTED_TURN_FIELDS,
    )
)
"""Fields of a turn that are read or refused. All others are metadata."""
TEXT_PART_FIELDS = ("type", "text", "cache_control")
"""Fields allowed in a text part. `cache_control` only concerns the server and is ignored."""
BLANK_TEXTS = ("", "[]", "{}", "null")
"""Texts that stand for an empty value in data sets that keep JSON as text."""
WRITE_MESSAGES = "Write a list of {role, content} messages."
WRITE_TOOLS = 'Write [{"type": "function", "function": {"name": "…", "parameters": {…}}}].'
WRITE_CALLS = 'Write [{"type": "function", "function": {"name": "…", "arguments": {…}}}].'
WRITE_ARGUMENTS = 'Write the arguments as an object, such as {"city": "Oslo"}, or as the JSON text of one.'
WRITE_RESULT = "Write what the tool returned as text, an object as its JSON text."
EMPTY_HELP = 'Give its text, leave the row out, or write "train": false on an answer that is not to be imitated.'
KEEP_ONE = "Keep one of the two."
HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
Fields = Mapping[str, Any]
"""Columns of a row, or fields of a message, by name."""


def build_field_error(column: str, value: Any, problem: str, remedy: str) -> InputError:
    """Return an InputError about a column or field of a row, with its value shortened to 80 characters.
    `Row.naming_errors` adds the file and the row number."""
    return InputError(column, format_value(value), problem, remedy)


def format_value(value: Any) -> str:
    """Format a value for an error message, on one line of at most 80 characters. Printable text without outer blanks is
    shown as it is, anything else by `repr`."""
    plain = isinstance(value, str) and value.isprintable() and value == value.strip() != ""
    text = value if plain else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def is_blank(value: Any) -> bool:
    """Return whether a value is falsy, or the JSON text of an empty value, such as `[]` or `null`."""
    return not value or (isinstance(value, str) and value.strip() in BLANK_TEXTS)


def parse_messages(value: Any, column: str) -> tuple[Message, ...]:
    """Parse a list of OpenAI message objects, `{role, content}`, into a tuple of Message.

    Args:
        column: the name that errors show.

    Raises:
        InputError: the value is no such list, or a message has content that cannot be kept.
    """
    if not isinstance(value, list) or not value:
        raise build_field_error(column, value, "is no list of messages", WRITE_MESSAGES)
    return tuple(parse_message(entry, f"{column}[{i}]") for i, entry in enumerate(value))


def parse_message(value: Any, column: str) -> Message:
    """Parse one OpenAI message object, `{role, content}`, into a Message. Raises InputError as `parse_messages`
    does."""
    if type(value) is dict and len(value) == 2:  # most messages are: nothing else is said of them
        role = value.get("role")
        content = value.get("content")
        if role in ROLES and type(content) is str:
            return Message(role, content)
    if not isinstance(value, Mapping):
        raise build_field_error(column, value, "is no message", WRITE_MESSAGES)
    check_unsupported_fields(value, UNSUPPORTED_TURN_FIELDS, f"{column}.")
    check_texts_agree(value, column)
    role = value.get("role")
    if isinstance(role, str):
        role = ROLE_ALIASES.get(role, role)
    if role not in ROLES:
        remedy = "Rename the role." if "role" in value else WRITE_MESSAGES
        raise build_field_error(f"{column}.role", role, f"is none of {', '.join(ROLES)}", remedy)
    trained = is_trained(value, role, column)
    content = value.get("content")
    if isinstance(content, list):
        content = join_parts(content, f"{column}.content")
    tools = parse_tool_fields(value, role, column)
    if content is None and (not trained or "tool_calls" in tools):
        content = ""
    if not isinstance(content, str):
        problem = "is missing" if content is None else "is no text"
        remedies = {"assistant": EMPTY_HELP, "tool": WRITE_RESULT}
        remedy = remedies.get(role, "Give its text, or leave the row out.")
        raise build_field_error(f"{column}.content", content, problem, remedy)
    return Message(role, add_reasoning(value, role, content, column), trained, **tools)


def parse_tool_fields(message: Fields, role: str, column: str) -> dict[str, Any]:
    """Return a message's tool arguments for `Message`: an assistant's `tool_calls`, or a tool result's `tool_call_id`
    and `name`. Most messages have none, which gives an empty dict.

    Raises:
        InputError: a role other than the assistant makes calls, or a role other than the tool answers one.
    """
    call_fields = [name for name in CALL_FIELDS if not is_blank(message.get(name))]
    calls = parse_calls(message, call_fields, column) if call_fields else ()
    if calls and role != "assistant":
        problem = f"stands in a turn of the {role}, and only the assistant calls tools"
        remedy = "Write the role assistant, or leave the calls out."
        raise build_field_error(f"{column}.{call_fields[0]}", calls[0].name, problem, remedy)
    if role == "tool":
        result = {name: message[name] for name in ("tool_call_id", "name") if message.get(name) not in (None, "")}
        for name, value in result.items():
            if not isinstance(value, str):
                raise build_field_error(f"{column}.{name}", value, "is no text", "Give it as text, or leave it out.")
        return result
    if (id := message.get("tool_call_id")) not in (None, ""):
        problem = f"stands in a turn of the {role}, and only results of tools answer calls"
        raise build_field_error(f"{column}.tool_call_id", id, problem, 'Write "role": "tool", or leave it out.')
    return {"tool_calls": calls} if calls else {}


def join_parts(parts: list[Any], column: str) -> str:
    """Join the texts of OpenAI's content parts, `{type: text, text: …}`, into one text.

    Raises:
        InputError: a part is not text.
    """
    for i, part in enumerate(parts):
        is_text = isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text or any(value for name, value in part.items() if name not in TEXT_PART_FIELDS):
            value = part.get("type", part) if isinstance(part, Mapping) else part
            problem = "is a list of parts that are not all text"
            raise build_field_error(f"{column}[{i}]", value, problem, "Leave the row out, or write its text alone.")
    return "".join(part["text"] for part in parts)


def add_reasoning(message: Fields, role: str, content: str, column: str) -> str:
    """Return `content` with the text of the message's reasoning field, if any, put in front in `<think>` tags.

    Raises:
        InputError: the reasoning is no text, belongs to another role than the assistant, or is in the content as well.
    """
    fields = {name: message[name] for name in REASONING_FIELDS if message.get(name)}
    for name, text in fields.items():
        problem = "is no text" if not isinstance(text, str) else "is reasoning, which only an assistant's turn may have"
        if not isinstance(text, str) or role != "assistant":
            raise build_field_error(f"{column}.{name}", text, problem, "Leave it out.")
        duplicate = "the content" if measure_reasoning(content) else next((n for n in fields if fields[n] != text), "")
        if duplicate:
            raise build_field_error(
                f"{column}.{name}", text, f"the turn already has reasoning in {duplicate}", KEEP_ONE
            )
    return prepend_reasoning(content, next(iter(fields.values()))) if fields else content


def is_trained(message: Fields, role: str, column: str) -> bool:
    """Return False for an assistant turn that `train` or `weight` excludes from the loss, True for all other turns.

    Raises:
        InputError: a weight is neither 0 nor 1, or a turn of another role is to be trained on.
    """
    flags = {name: message[name] for name in TRAIN_FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        if value not in (0, 1):
            problem = "is neither 0 nor 1: a turn is trained on or it is not"
            raise build_field_error(f"{column}.{name}", value, problem, "Write 0 or 1, or false or true.")
        if value == 1 and role != "assistant":
            problem = f"asks to train on a {role} turn, but only the assistant's turns are trained on"
            raise build_field_error(f"{column}.{name}", value, problem, "Leave it out.")
    if len({bool(value) for value in flags.values()}) > 1:
        raise build_field_error(column, flags, "contradicts itself", f"Keep one of {', '.join(flags)}.")
    return role != "assistant" or all(flags.values())


def check_row_weight(row: Fields) -> None:
    """Raise InputError if a row of supervised training has a weight other than 1 in a column such as `weight`. Pairs of
    a ranking are weighted too, but by their number and not by a column."""
    if row.keys().isdisjoint(TRAIN_FLAGS):
        return
    for name in TRAIN_FLAGS:
        value = row.get(name)
        is_number = isinstance(value, int | float)  # a text column `train` may mean something else
        if (is_number and value != 1) or (name == "weight" and value is not None and not is_number):
            problem = "is a weight of a whole row, which is not supported: all rows have the same weight"
            raise build_field_error(
                name, value, problem, "Leave the row out, or write it twice; weigh turns by 0 or 1."
            )


def check_texts_agree(turn: Fields, column: str) -> None:
    """Raise InputError if a turn's fields `content`, `value` and `text` hold different texts."""
    texts = {name: turn[name] for name in TEXT_FIELDS if isinstance(turn.get(name), str) and turn[name]}
    for name, text in texts.items():
        first = next(iter(texts))
        if text != texts[first]:
            raise build_field_error(f"{column}.{name}", text, f"is another text than that of `{first}`", KEEP_ONE)


def check_unsupported_fields(fields: Fields, unsupported: Mapping[str, tuple[str, str]], prefix: str = "") -> None:
    """Raise InputError if a field listed in `unsupported`, such as `images`, is not empty.

    Args:
        unsupported: field → (problem, remedy), see `UNSUPPORTED_FIELDS`.
        prefix: put before the field's name in errors.
    """
    if unsupported.keys().isdisjoint(fields.keys()):
        return
    for name, (problem, remedy) in unsupported.items():
        if not is_blank(value := fields.get(name)):
            raise build_field_error(f"{prefix}{name}", value, problem, remedy)


def with_system_column(messages: tuple[Message, ...], row: Fields) -> tuple[Message, ...]:
    """Return the messages with the system prompt of the row's column `system` or `system_prompt`, if any, put in front.

    Raises:
        InputError: the column holds no text, or the conversation begins with another system prompt.
    """
    for name in SYSTEM_COLUMNS:
        text = row.get(name)
        if text in (None, ""):
            continue
        if not isinstance(text, str):
            raise build_field_error(name, text, "is no text", "Give the system prompt as text, or leave it out.")
        if not messages or messages[0].role != "system":
            messages = (Message("system", text), *messages)
        elif messages[0].content != text:
            problem = f"is another system prompt than that of the conversation ({messages[0].content[:60]!r})"
            raise build_field_error(name, text, problem, KEEP_ONE)
    return messages


def pairs_to_turns(exchanges: Iterable[Iterable[str]]) -> list[dict[str, str]]:
    """Convert (question, answer) pairs to a list of `{role, content}` messages of user and assistant."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in exchanges for role, text in zip(roles, pair, strict=True)]


def with_default_system(messages: tuple[Message, ...], system: str | None) -> tuple[Message, ...]:
    """Return the messages with the system prompt `system` put in front, unless they begin with one or it is `None`."""
    if system is None or messages[0].role == "system":
        return messages
    return (Message("system", system), *messages)


def parse_transcript(text: str) -> tuple[Message, ...]:
    r"""Split an HH transcript (`\n\nHuman: …`) or a HelpSteer2 one (`<extra_id_1>`) into messages. Any other text
    becomes one user turn."""
    roles = {"Human": "user", "User": "user", "Assistant": "assistant"}
    if HH_TURN.match(text.lstrip(" ")):
        _, *parts = HH_TURN.split(text.lstrip(" "))
        return tuple(
            Message(roles[speaker], content.strip()) for speaker, content in zip(parts[::2], parts[1::2], strict=True)
        )
    first, *parts = HELPSTEER_TURN.split(text)
    later = (Message(roles[speaker], content) for speaker, content in zip(parts[::2], parts[1::2], strict=True))
    return (Message("user", first), *later)


def parse_json_value(raw: Any, column: str) -> Any:
    """Decode a value that may be given as JSON text. A text that is not JSON, and any value that is not text, is
    returned as it is.

    Raises:
        InputError: an object in the text has a key twice, or a string holds characters that cannot be kept.
    """
    if not isinstance(raw, str):
        return raw
    try:
        value = DECODER.decode(raw)
    except DuplicateKeyError as error:
        raise build_field_error(column, raw, f"has the key {error} twice in one object", "Keep one.") from error
    except (ValueError, RecursionError):
        return raw
    check_json_values(value, column)
    return value


def parse_single_field(fields: Fields, names: list[str], column: str) -> Any:
    """Return the value of the field `names[0]`, decoded if it is JSON text. Raises InputError if `names`, the fields
    that are not blank, has several names."""
    value = fields[names[0]]
    if len(names) > 1:
        raise build_field_error(column, value, f"stands beside {names[1]}", KEEP_ONE)
    return parse_json_value(value, column)


def parse_tools(row: Fields) -> tuple[Tool, ...]:
    """Parse the tool schemas in a row's column `tools` or `functions`. Returns an empty tuple if both are blank.

    Raises:
        InputError: the value is no list of schemas, or two tools have one name.
    """
    columns = [name for name in TOOL_COLUMNS if not is_blank(row.get(name))]
    if not columns:
        return ()
    column = columns[0]
    values = parse_single_field(row, columns, column)
    if not isinstance(values, list):
        raise build_field_error(column, row[column], "is no list of tools", WRITE_TOOLS)
    tools = tuple(parse_tool(value, f"{column}[{i}]") for i, value in enumerate(values))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise build_field_error(f"{column}[{i}]", name, "is offered twice", KEEP_ONE)
    return tools


def parse_tool(raw: Any, column: str) -> Tool:
    """Parse one tool schema: OpenAI's `{type: function, function: {name, parameters}}`, or the function alone. Raises
    InputError for anything else."""
    value = parse_json_value(raw, column)
    if isinstance(value, Mapping) and value.get("type", "function") not in ("function", "object", None):
        raise build_field_error(f"{column}.type", value["type"], "is a type of tool that is not supported", WRITE_TOOLS)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise build_field_error(column, raw, "is no schema of a tool: it names no function", WRITE_TOOLS)
    for name, kind, expected in (("parameters", Mapping, "an object"), ("description", str, "a text")):
        if not isinstance(function.get(name), kind | None):
            raise build_field_error(f"{column}.{name}", function[name], f"is not {expected}", WRITE_TOOLS)
    try:
        return Tool.from_dict(value)
    except ValueError as error:
        raise build_field_error(column, raw, f"is no schema of a tool ({error})", WRITE_TOOLS) from error


def parse_calls(message: Fields, names: list[str], column: str) -> tuple[ToolCall, ...]:
    """Parse the tool calls in a message's field `tool_calls` or `function_call`, whose value may be JSON text. Raises
    InputError if a call is invalid.

    Args:
        message: the message's fields.
        names: names of the fields that hold calls.
        column: the message's place, for errors.
    """
    place = f"{column}.{names[0]}"
    value = parse_single_field(message, names, place)
    if names[0] == "function_call" and not isinstance(value, list):
        return (parse_call(value, place),)
    if not isinstance(value, list):
        raise build_field_error(place, message[names[0]], "is no list of calls", WRITE_CALLS)
    return tuple(parse_call(call, f"{place}[{i}]") for i, call in enumerate(value))


def parse_call(raw: Any, column: str) -> ToolCall:
    """Parse one tool call: OpenAI's `{id, type, function: {name, arguments}}`, or `{name, arguments}`. Raises
    InputError for anything else."""
    value = parse_json_value(raw, column)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise build_field_error(column, raw, "is no call: it names no tool", WRITE_CALLS)
    if value.get("type") not in (None, "function"):
        raise build_field_error(f"{column}.type", value["type"], "is a type of call that is not supported", WRITE_CALLS)
    id = value.get("id")
    if not isinstance(id, str | None):
        raise build_field_error(f"{column}.id", id, "is no text", "Give the id as text, or leave it out.")
    raw_arguments = function.get("arguments")
    # OpenAI and vLLM write "" for a call without arguments.
    is_empty = raw_arguments is None or (isinstance(raw_arguments, str) and not raw_arguments.strip())
    arguments = {} if is_empty else parse_json_value(raw_arguments, f"{column}.arguments")
    reason = ""
    if isinstance(arguments, Mapping):
        try:
            return ToolCall.from_arguments(name, arguments, id or "")
        except ValueError as error:
            reason = f" ({error})"
    raise build_field_error(f"{column}.arguments", raw_arguments, f"is no JSON object{reason}", WRITE_ARGUMENTS)


def check_tool_calls(placed_messages: Sequence[tuple[str, Message]], tools: Iterable[Tool]) -> None:
    """Raise InputError if tool calls and tool results of a conversation do not match, or if a called tool is not
    offered.

    A last turn of calls may be trained on and needs no results.

    Args:
        placed_messages: (place in the row, message) for each turn.
        tools: the tools that the row offers.

    Raises:
        InputError: a result answers no call, a call has no result although the conversation goes on, or a called tool
            is not offered.
    """
    if not any(turn.tool_calls or turn.role == "tool" for _, turn in placed_messages):  # most have none
        return
    offered = {tool.name for tool in tools}
    open_calls = list[ToolCall]()
    place_of_calls = ""

    def check_answered() -> None:
        if open_calls:
            call = open_calls[0]
            description = f"{call.name} ({call.id})" if call.id else call.name
            remedy = "Put the result of each call behind it, as a turn of the role tool, or end the row with the calls."
            problem = "has no result, and the conversation goes on"
            raise build_field_error(f"{place_of_calls}.tool_calls", description, problem, remedy)

    for place_of_text, turn in placed_messages:
        place = place_of_text.removesuffix(".content").removesuffix(".value")
        if turn.role == "tool":
            open_calls.remove(find_answered_call(turn, open_calls, place))
            continue
        check_answered()
        open_calls = list(turn.tool_calls)
        place_of_calls = place
        for i, call in enumerate(open_calls):
            call_place = f"{place}.tool_calls[{i}]"
            if offered and call.name not in offered:
                problem = f"calls a tool that is not among those offered ({', '.join(sorted(offered))})"
                remedy = "Correct the name, or add its schema to tools."
                raise build_field_error(f"{call_place}.name", call.name, problem, remedy)
            if call.id and call.id in [earlier.id for earlier in open_calls[:i]]:
                problem = "is the id of two calls of one turn"
                raise build_field_error(f"{call_place}.id", call.id, problem, "Give each its own.")
    if placed_messages[-1][1].role == "tool":
        check_answered()


def find_answered_call(turn: Message, open_calls: list[ToolCall], place: str) -> ToolCall:
    """Return the open call that a tool result answers: by its id, else by its tool's name, else the first open call.
    Raises InputError if no open call matches."""
    if not open_calls:
        problem = "is the result of a tool, but no call comes before it"
        remedy = "Write the call into tool_calls of the answer before it, or leave the row out."
        raise build_field_error(f"{place}.role", "tool", problem, remedy)
    remedy = "Correct {}, or leave it out."
    if turn.tool_call_id:
        calls = [call for call in open_calls if call.id == turn.tool_call_id]
        if not calls:
            ids = ", ".join(call.id for call in open_calls if call.id) or "none has an id"
            problem = f"is not the id of a call without a result ({ids})"
            raise build_field_error(f"{place}.tool_call_id", turn.tool_call_id, problem, remedy.format("it"))
    else:
        calls = [call for call in open_calls if turn.name in ("", call.name)]
    if not calls or turn.name not in ("", calls[0].name):
        problem = (
            f"is not the name of a tool whose result is still missing "
            f"({', '.join(call.name for call in calls or open_calls)})"
        )
        raise build_field_error(f"{place}.name", turn.name, problem, remedy.format("the name"))
    return calls[0]
