"""Script that renders conversations of many lengths with a chat template.

A template is a program, which may loop for ever or allocate all memory. So `align.data.chat.template` runs this script
in a process with limits. Its input is JSON `{template, special, megabytes}`.
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


def build_call(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return an assistant message that calls the test tool `f` with `arguments`."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def iter_conversations() -> Iterator[tuple[list[Any], list[Any] | None]]:
    """Yield test conversations as (messages, tools), short ones, long ones and ones of many turns. Tools are `None` in
    conversations without tool calls."""
    system = {"role": "system", "content": "s"}
    yield [USER], None
    yield [USER, ANSWER], None
    yield [system, USER, ANSWER, USER], None
    yield [USER, build_call({"x": 1}), RESULT, ANSWER, USER], [TOOL]
    for length in LENGTHS:
        for text in ("a" * length, (WORDS * (length // len(WORDS) + 1))[:length]):
            question = {"role": "user", "content": text}
            answer = {"role": "assistant", "content": text}
            yield [question], None
            yield [{"role": "system", "content": text}, question, answer, question], None
            call = build_call({"x": text, "y": [1] * min(length, 1_000)})
            function = {**FUNCTION, "description": text}
            tools = [{"type": "function", "function": {**function, "name": f"f{i}"}} for i in range(TOOLS)]
            yield [question, call, {**RESULT, "content": text}, answer, question], tools
    many_turns = [USER, ANSWER] * (TURNS // 2)
    yield [*many_turns, USER], None
    yield [system, *many_turns, USER], [TOOL] * TOOLS
    yield [*[USER, build_call({"x": 1}), RESULT, ANSWER] * (TURNS // 4), USER], [TOOL] * TOOLS


def raise_template_error(message: str) -> None:
    """Raise TemplateError. Chat templates call this as `raise_exception` to refuse a conversation."""
    raise TemplateError(message)


def main() -> int:
    """Render built-in test conversations with the chat template from standard input, under a memory limit, and discard
    the text. Returns exit status 0, or 3 if the template exceeded the memory limit.

    A template may refuse a conversation.
    """
    request = json.load(sys.stdin)
    limit = request["megabytes"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": raise_template_error, "strftime_now": lambda form: form}
    template = None
    for messages, tools in iter_conversations():
        variables = {
            **request["special"],
            "messages": messages,
            "add_generation_prompt": messages[-1]["role"] == "user",
        }
        variables |= {"tools": tools} if tools else {}
        try:
            template = template or environment.from_string(request["template"])
            for _ in template.generate(**variables):
                pass
        except MemoryError:
            return 3
        except Exception:  # it is reported for the row that the template refuses
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
