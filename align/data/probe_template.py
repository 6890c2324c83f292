"""One turn by a chat template, in a process of its own: a template is a program, which may loop for ever or ask for all
the memory there is. `align.data.template` runs it, with `{template, variables, megabytes}` as JSON on its input."""

import json
import resource
import sys

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def refuse(message: str) -> None:
    raise TemplateError(message)


def main() -> int:
    """0 where the template wrote a turn or refused it; 3 where it asked for more memory than it may have."""
    given = json.load(sys.stdin)
    limit = given["megabytes"] * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    try:
        for _ in environment.from_string(given["template"]).generate(**given["variables"]):
            pass
    except MemoryError:
        return 3
    except Exception:  # what it raises is said of the row that it refuses
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
