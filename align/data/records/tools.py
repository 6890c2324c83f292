"""Tools as files write them: those that a row offers, the calls of an answer, and which result answers which call.

A JSON value may stand as its text everywhere here: OpenAI writes arguments so, and tables hold nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align.data.formats.values import READ, KeyTwice, check_values
from align.data.records.refusals import refused
from align.types import Message, Tool, ToolCall

OFFERED = ("tools", "functions")
"""Columns that hold what the assistant may call: OpenAI's, and its older name."""
CALLS = ("tool_calls", "function_call")
"""Fields of a message that hold calls: OpenAI's, and its older name for one call."""
RESULTS = {"tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool"}
"""Roles that tools speak in, by OpenAI's two names, ShareGPT's and Llama's → ours."""
NOTHING = ("", "[]", "{}", "null")
"""Texts that say nothing, in data sets that keep JSON as text."""
WRITE_TOOLS = 'Write [{"type": "function", "function": {"name": "…", "parameters": {…}}}].'
WRITE_CALLS = 'Write [{"type": "function", "function": {"name": "…", "arguments": {…}}}].'
WRITE_ARGUMENTS = 'Write the arguments as an object, such as {"city": "Oslo"}, or as the JSON text of one.'


def says_nothing(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.strip() in NOTHING)


def tools_of(row: Mapping[str, Any], where: str) -> tuple[Tool, ...]:
    """What a row offers to the assistant.

    Raises:
        InputError: it is no list of schemas, or a name stands twice.
    """
    given = [name for name in OFFERED if not says_nothing(row.get(name))]
    if not given:
        return ()
    column = given[0]
    if len(given) > 1:
        raise refused(where, column, row[column], f"stands beside {given[1]}", "Keep one of the two.")
    values = value_of(row[column], where, column)
    if not isinstance(values, list):
        raise refused(where, column, row[column], "is no list of tools", WRITE_TOOLS)
    tools = tuple(tool_of(one, where, f"{column}[{i}]") for i, one in enumerate(values))
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise refused(where, f"{column}[{i}]", name, "is offered twice", "Keep one of the two.")
    return tools


def tool_of(given: Any, where: str, column: str) -> Tool:
    """One of them."""
    value = value_of(given, where, column)
    if isinstance(value, Mapping) and value.get("type", "function") not in ("function", "object", None):
        raise refused(where, f"{column}.type", value["type"], "is a kind of tools that is not read", WRITE_TOOLS)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise refused(where, column, given, "is no schema of a tool: it names no function", WRITE_TOOLS)
    for name, kind, wanted in (("parameters", Mapping, "an object"), ("description", str, "a text")):
        if not isinstance(function.get(name), kind | None):
            raise refused(where, f"{column}.{name}", function[name], f"is not {wanted}", WRITE_TOOLS)
    try:
        return Tool.of(value)
    except ValueError as error:
        raise refused(where, column, given, f"is no schema of a tool ({error})", WRITE_TOOLS) from error


def calls_of(message: Mapping[str, Any], where: str, column: str) -> tuple[ToolCall, ...]:
    """The calls of a message.

    Raises:
        InputError: they are none.
    """
    given = [name for name in CALLS if not says_nothing(message.get(name))]
    if not given:
        return ()
    name = given[0]
    at, value = f"{column}.{name}", value_of(message[name], where, f"{column}.{name}")
    if len(given) > 1:
        raise refused(where, at, message[name], f"stands beside {given[1]}", "Keep one of the two.")
    values = [value] if name == "function_call" and not isinstance(value, list) else value
    if not isinstance(values, list):
        raise refused(where, at, message[name], "is no list of calls", WRITE_CALLS)
    return tuple(call_of(one, where, at if values is not value else f"{at}[{i}]") for i, one in enumerate(values))


def call_of(given: Any, where: str, column: str) -> ToolCall:
    """One call: OpenAI's `{id, type, function: {name, arguments}}`, or `{name, arguments}` alone."""
    value = value_of(given, where, column)
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise refused(where, column, given, "is no call: it names no tool", WRITE_CALLS)
    if value.get("type") not in (None, "function"):
        raise refused(where, f"{column}.type", value["type"], "is a kind of calls that is not read", WRITE_CALLS)
    id = value.get("id")
    if not isinstance(id, str | None):
        raise refused(where, f"{column}.id", id, "is no text", "Give the id as text, or leave it out.")
    written = function.get("arguments")
    none = written is None or (isinstance(written, str) and not written.strip())  # OpenAI and vLLM write "" for none
    arguments = {} if none else value_of(written, where, f"{column}.arguments")
    if not isinstance(arguments, Mapping):
        raise refused(where, f"{column}.arguments", written, "is no JSON object", WRITE_ARGUMENTS)
    try:
        return ToolCall.of(name, arguments, id or "")
    except ValueError as error:
        raise refused(where, f"{column}.arguments", written, f"is no JSON object ({error})", WRITE_ARGUMENTS) from error


def result_of(message: Mapping[str, Any], where: str, column: str) -> dict[str, str]:
    """Which call the result of a tool answers: `tool_call_id` and `name`, as far as they are given."""
    found = {name: message[name] for name in ("tool_call_id", "name") if message.get(name) not in (None, "")}
    for name, value in found.items():
        if not isinstance(value, str):
            raise refused(where, f"{column}.{name}", value, "is no text", "Give it as text, or leave it out.")
    return found


def value_of(given: Any, where: str, column: str) -> Any:
    """A JSON value, which may be given as its text; a text that writes none stays.

    Raises:
        InputError: a key stands twice in an object of the text, or it holds what no text can.
    """
    if not isinstance(given, str):
        return given
    try:
        found = READ.decode(given)
    except KeyTwice as error:
        problem = f"has the key {error} twice in one object"
        raise refused(where, column, given, problem, "Keep one.") from error
    except (ValueError, RecursionError):
        return given
    check_values(found, where, column)
    return found


def check_calls(placed: Sequence[tuple[str, Message]], tools: Iterable[Tool], where: str) -> None:
    """Raises where a result answers no call, a call has no result though the conversation goes on, or a call is of no
    tool that is offered. A last turn of calls is what may be trained on, and needs no results.

    Args:
        placed: the turns of a conversation, each with the place in the row that it, or its text, stands at.
    """
    if not any(turn.tool_calls or turn.role == "tool" for _, turn in placed):  # most have none
        return
    offered, waiting, place_of_calls = {tool.name for tool in tools}, list[ToolCall](), ""
    last = ""
    for at, turn in placed:
        place, last = at.removesuffix(".content").removesuffix(".value"), turn.role
        if turn.role == "tool":
            waiting.remove(answered_by(turn, waiting, place, where))
            continue
        if waiting:
            raise unanswered(waiting[0], place_of_calls, where)
        waiting, place_of_calls = list(turn.tool_calls), place
        for i, call in enumerate(waiting):
            at = f"{place}.tool_calls[{i}]"
            if offered and call.name not in offered:
                problem = f"calls a tool that is not among those offered ({', '.join(sorted(offered))})"
                raise refused(where, f"{at}.name", call.name, problem, "Correct the name, or add its schema to tools.")
            if call.id and call.id in [other.id for other in waiting[:i]]:
                raise refused(where, f"{at}.id", call.id, "is the id of two calls of one turn", "Give each its own.")
    if waiting and last == "tool":
        raise unanswered(waiting[0], place_of_calls, where)


def unanswered(call: ToolCall, place: str, where: str) -> Exception:
    problem = "has no result, and the conversation goes on"
    shown = f"{call.name} ({call.id})" if call.id else call.name
    remedy = "Put the result of each call behind it, as a turn of the role tool, or end the row with the calls."
    return refused(where, f"{place}.tool_calls", shown, problem, remedy)


def answered_by(turn: Message, waiting: list[ToolCall], place: str, where: str) -> ToolCall:
    """The call that a result answers: of its id, else the first of its name, else the first."""
    if not waiting:
        problem = "is the result of a tool, and no call stands before it"
        remedy = "Write the call into tool_calls of the answer before it, or leave the row out."
        raise refused(where, f"{place}.role", "tool", problem, remedy)
    if turn.tool_call_id:
        found = [call for call in waiting if call.id == turn.tool_call_id]
        named = ", ".join(call.id for call in waiting if call.id) or "none has an id"
        if not found:
            problem = f"is the id of no call that waits for a result ({named})"
            raise refused(where, f"{place}.tool_call_id", turn.tool_call_id, problem, "Correct it, or leave it out.")
    else:
        found = [call for call in waiting if turn.name in ("", call.name)]
    if not found or turn.name not in ("", found[0].name):
        names = ", ".join(call.name for call in found or waiting)
        problem = f"is the name of no tool whose result is due ({names})"
        raise refused(where, f"{place}.name", turn.name, problem, "Correct the name, or leave it out.")
    return found[0]
