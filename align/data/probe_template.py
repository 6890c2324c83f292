"""A few turns by a chat template, in a process of its own: a template is a program, which may loop for ever or ask for
all the memory there is. `align.data.template` runs it, with `{template, special, megabytes}` as JSON on its input."""

import json
import resource
import sys

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}  # fmt: skip
RESULT = {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "1"}
TALKS = (
    ([USER], None), ([USER, ANSWER], None), ([{"role": "system", "content": "s"}, USER, ANSWER, USER], None),
    ([USER, CALL, RESULT, ANSWER, USER], [TOOL]),
)  # fmt: skip
"""Messages, and the tools that are offered."""


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
    for talk, tools in TALKS:
        variables = {**given["special"], "messages": talk, "add_generation_prompt": talk[-1] is USER}
        variables |= {"tools": tools} if tools else {}
        try:
            for _ in environment.from_string(given["template"]).generate(**variables):
                pass
        except MemoryError:
            return 3
        except Exception:  # what it raises is said of the row that it refuses
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
