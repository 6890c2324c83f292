"""Code by unit tests: what passes, what only seems to, and what the limits stop. The programs are really run."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from align.errors import InputError
from align.reward.checkers import Checked, checker, code, sandbox
from align.reward.checkers.code import program

SQUARE = "def f(x):\n    return x * x\n"
HUMAN_EVAL = {
    "prompt": "from typing import List\n\ndef helper(x):\n    return x * x\n\n"
    'def f(xs: List[int]) -> int:\n    """Sum of squares."""\n',
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 5\n    assert candidate([]) == 0\n",
    "entry_point": "f",
}  # fmt: skip


FORGES = """
import os
for fd in range(64):
    try:
        os.write(fd, b'[-1, ""]\\n[0, ""]\\n[1, ""]\\n')
    except OSError:
        pass
os._exit(0)
"""
"""Writes a report of its own wherever one may be read."""


def run(answer: str, *tests: str, **spec: Any) -> Checked:
    given = spec if "test" in spec else {"tests": list(tests) or ["assert f(2) == 4", "assert f(3) == 9"], **spec}
    return checker({"kind": "code", **given}, "check", allow_code=True)(answer)


def test_code_runs_only_where_the_user_agreed():
    with pytest.raises(InputError, match=r"stage\.allow_code=true"):
        checker({"kind": "code", "tests": ["assert True"]}, "check")


@pytest.mark.parametrize(
    "answer",
    [
        SQUARE,
        f"Here:\n```python\n{SQUARE}```\nDone.",
        f"```\n{SQUARE}",
        f"```sh\npip install x\n```\n```py\n{SQUARE}```",
    ],
)
def test_code_is_found_in_an_answer(answer: str):
    assert run(answer).score == 1


def test_each_test_is_a_part():
    found = run("def f(x): return 4")
    assert [(part.held, part.asks) for part in found.parts] == [
        (True, "passes: assert f(2) == 4"), (False, "passes: assert f(3) == 9"),
    ]  # fmt: skip
    assert found.parts[1].found.startswith("AssertionError")
    assert found.score == 0


def test_tests_that_fail_at_length_leave_the_verdict_on_those_before_them():
    long = "def f(x):\n    if x < 300: return 4\n    raise ValueError('\U0001f600' * 300)\n"
    found = run(long, *(f"assert f({x}) == 4" for x in range(500)))
    assert (found.score, found.error) == (0, "")
    assert [part.held for part in found.parts] == [True] * 300 + [False] * 200


@pytest.mark.parametrize(
    "answer",
    [
        "    return sum(helper(x) for x in xs)\n",
        "```python\ndef f(xs: List[int]) -> int:\n    return sum(map(helper, xs))\n```",
        f"```python\n{HUMAN_EVAL['prompt']}    return sum(helper(x) for x in xs)\n```",
        "```python\nprint(f([1]))\n```\nwhere\n```python\nf = lambda xs: sum(helper(x) for x in xs)\n```",
    ],
)
def test_humaneval_takes_a_continuation_or_a_whole_function(answer: str):
    assert run(answer, **HUMAN_EVAL).score == 1
    assert run(answer.replace("helper(x) for", "abs(x) for").replace("map(helper", "map(abs"), **HUMAN_EVAL).score == 0


def test_a_prompt_without_a_body_is_completed():
    assert "def f(x):\n    pass\n" in program("def f(x): return 1", "def f(x):\n", "f")


@pytest.mark.parametrize(
    "answer",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(x):\n    import os; os._exit(0)",
        "def f(x):\n    import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        FORGES,
        "raise SystemExit",
        "\ud800",
        "\0",
        "(" * 10_000,
        "",
    ],
    ids=range(10),
)
def test_a_program_that_ends_early_has_not_passed(answer: str):
    found = run(answer)
    assert not any(part.held for part in found.parts)
    assert all(part.found for part in found.parts)
    assert not found.error


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("x = 'a' * 2**33", "MemoryError"),
        ("open('big', 'w').write('x' * 10**8)", "File too large"),
        ("[open('/dev/null') for _ in range(200)]", "Too many open files"),
        ("import os; os.environ['MY_SECRET']", "KeyError"),
    ],
)
def test_limits(statement: str, found: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    assert found in run(statement).parts[0].found


def test_a_file_may_be_written_where_the_program_runs_and_nothing_of_it_stays():
    before = set(os.listdir())
    assert run("open('notes', 'w').write('x')\nprint('y' * 10**7)\n" + SQUARE).score == 1
    assert set(os.listdir()) == before


def test_a_program_that_does_not_end_is_killed_with_its_children():
    mark = f"mark{os.getpid()}"
    forks = f"import os, time\nfor _ in range(3):\n    os.fork()\nopen({mark!r}, 'w')\ntime.sleep(60) or {mark!r}\n"
    begun = time.monotonic()
    found = run(forks, timeout=1)
    assert 1 <= time.monotonic() - begun < 5
    assert found.parts[0].found == "it took more than 1 s"
    passed_first = run("def f(x):\n    while x == 3: pass\n    return x * x", timeout=1)
    assert [part.held for part in passed_first.parts] == [True, False]


def alive(mark: str) -> bool:
    """Whether a process has a text in its command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue  # it has ended
    return any(mark.encode() in line for line in found)


def test_no_child_outlives_its_program():
    if not sandbox.isolation()[0]:
        pytest.skip("needs: user namespaces")
    mark = f"align_child_{os.getpid()}"
    sleeps = f"[sys.executable, '-c', 'import time; time.sleep(30) # {mark}']"
    child = f"import subprocess, sys\nsubprocess.Popen({sleeps}, start_new_session=True)\n"
    assert run(child + SQUARE).score == 1
    time.sleep(0.2)
    assert not alive(mark)


CONNECTS = "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=2)\n"


@pytest.mark.parametrize("kind", ["bubblewrap", "unshare"])
def test_no_network_in_a_namespace(kind: str, monkeypatch: pytest.MonkeyPatch):
    command = getattr(sandbox, kind)()
    if not sandbox.works(command):
        pytest.skip(f"needs: {kind}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        connects = CONNECTS.replace("PORT", str(server.getsockname()[1])) + SQUARE
        monkeypatch.setattr(sandbox, "isolation", lambda: (kind, tuple(command)))
        assert run(SQUARE).score == 1
        assert re.search("refused|unreachable", run(connects).parts[0].found)
        monkeypatch.setattr(sandbox, "isolation", lambda: ("", ()))
        assert run(connects).score == 1, "without a namespace the same program does connect"


def test_bubblewrap_hides_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if sandbox.isolation()[0] != "bubblewrap":
        pytest.skip("needs: bubblewrap")
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    assert "No such file" in run(f"open({str(secret)!r}).read()\n{SQUARE}").parts[0].found
    assert "Read-only" in run(f"open('/usr/align', 'w')\n{SQUARE}").parts[0].found


def test_a_machine_without_namespaces_is_told_so(monkeypatch: pytest.MonkeyPatch):
    spec = {"kind": "code", "tests": ["assert f(2) == 4"]}
    for kind, said in (("", "the machine's network"), ("unshare", "this user's files"), ("bubblewrap", "")):
        monkeypatch.setattr(code, "isolation", lambda kind=kind: (kind, ()))
        warnings = checker(spec, "check", allow_code=True).warnings
        assert said in "".join(warnings)
        assert bool(warnings) == bool(said)
        assert all("no sandbox" in each for each in warnings)


@pytest.mark.parametrize(
    ("spec", "field", "problem"),
    [
        ({}, "check.tests", "either"),
        ({"tests": ["assert ("]}, "check.tests[0]", "is no Python"),
        ({"test": "def check(f): pass"}, "check.entry_point", "is needed"),
        ({"test": "def check(f): pass", "entry_point": "f()"}, "check.entry_point", "is no name"),
        ({"tests": ["pass"], "timeout": 0}, "check.timeout", "out of bounds"),
        ({"tests": ["pass"], "memory_mb": 1.5}, "check.memory_mb", "out of bounds"),
        ({"tests": ["pass"], "network": True}, "check.network", "is not a key"),
    ],
)
def test_a_wrong_check_is_named(spec: dict[str, Any], field: str, problem: str):
    with pytest.raises(InputError, match=problem) as caught:
        checker({"kind": "code", **spec}, "check", allow_code=True)
    assert caught.value.field == field
