"""Conversations of every length by a chat template, in a process of its own.

A template is a program, which may loop for ever or ask for all the memory there is. `align.data.chat.template` runs
this with `{template, special, megabytes}` as JSON on its input.
"""

import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
RESULT = {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "1"}
LENGTHS = (1, 100, 2_000, 30_000)
"""Characters of a turn."""
TURNS = 60
WORDS = 'The 1st of 12 lines,\n\tof <b>\u00e9\u4e2d</b> "text" and </think> {x: 0.5}; '
TOOLS = 12


def call_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the turn of an assistant that calls the tool."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def talks() -> Iterator[tuple[list[Any], list[Any] | None]]:
    """Conversations that are short, long and of many turns: messages, and the tools that are offered."""
    system = {"role": "system", "content": "s"}
    yield [USER], None
    yield [USER, ANSWER], None
    yield [system, USER, ANSWER, USER], None
    yield [USER, call_of({"x": 1}), RESULT, ANSWER, USER], [TOOL]
    for length in LENGTHS:
        for text in ("a" * length, (WORDS * (length // len(WORDS) + 1))[:length]):
            said = {"role": "user", "content": text}
            answered = {"role": "assistant", "content": text}
            yield [said], None
            yield [{"role": "system", "content": text}, said, answered, said], None
            call = call_of({"x": text, "y": [1] * min(length, 1_000)})
            described = {**FUNCTION, "description": text}
            tools = [{"type": "function", "function": {**described, "name": f"f{i}"}} for i in range(TOOLS)]
            yield [said, call, {**RESULT, "content": text}, answered, said], tools
    many = [USER, ANSWER] * (TURNS // 2)
    yield [*many, USER], None
    yield [system, *many, USER], [TOOL] * TOOLS
    yield [*[USER, call_of({"x": 1}), RESULT, ANSWER] * (TURNS // 4), USER], [TOOL] * TOOLS


def refuse(message: str) -> None:
    raise TemplateError(message)


def main() -> int:
    """0 where the template wrote each conversation or refused it; 3 where it asked for more memory than it may have."""
    given = json.load(sys.stdin)
    limit = given["megabytes"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    template = None
    for talk, tools in talks():
        variables = {**given["special"], "messages": talk, "add_generation_prompt": talk[-1]["role"] == "user"}
        variables |= {"tools": tools} if tools else {}
        try:
            template = template or environment.from_string(given["template"])
            for _ in template.generate(**variables):
                pass
        except MemoryError:
            return 3
        except Exception:  # what it raises is said of the row that it refuses
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
