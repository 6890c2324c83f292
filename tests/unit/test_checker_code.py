"""Code checked by unit tests: programs that pass, that fake a pass, and that exceed limits. They are really run."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from align.core.errors import InputError
from align.reward.checkers import CheckResult, build_checker, sandbox
from align.reward.checkers.code import build_program

SQUARE = "def f(x):\n    return x * x\n"
HUMAN_EVAL = {
    "prompt": "from typing import List\n\ndef helper(x):\n    return x * x\n\n"
    'def f(xs: List[int]) -> int:\n    """Sum of squares."""\n',
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 5\n    assert candidate([]) == 0\n",
    "entry_point": "f",
}


FORGES = """
import os
for fd in range(64):
    try:
        os.write(fd, b'[-1, ""]\\n[0, ""]\\n[1, ""]\\n')
    except OSError:
        pass
os._exit(0)
"""
"""Writes a forged report to every open file descriptor."""


def check_answer(answer: str, *tests: str, **spec: Any) -> CheckResult:
    check = spec if "test" in spec else {"tests": list(tests) or ["assert f(2) == 4", "assert f(3) == 9"], **spec}
    return build_checker({"kind": "code", **check}, "check", allow_code=True)(answer)


def test_code_runs_only_where_the_user_agreed():
    with pytest.raises(InputError, match=r"stage\.allow_code=true"):
        build_checker({"kind": "code", "tests": ["assert True"]}, "check")


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
    assert check_answer(answer).score == 1


def test_each_test_is_a_part():
    checked = check_answer("def f(x): return 4")
    assert [(part.held, part.asks) for part in checked.parts] == [
        (True, "passes: assert f(2) == 4"),
        (False, "passes: assert f(3) == 9"),
    ]
    assert checked.parts[1].found.startswith("AssertionError")
    assert checked.score == 0


def test_tests_that_fail_at_length_leave_the_verdict_on_those_before_them():
    long = "def f(x):\n    if x < 300: return 4\n    raise ValueError('\U0001f600' * 300)\n"
    checked = check_answer(long, *(f"assert f({x}) == 4" for x in range(500)))
    assert (checked.score, checked.error) == (0, "")
    assert [part.held for part in checked.parts] == [True] * 300 + [False] * 200


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
    assert check_answer(answer, **HUMAN_EVAL).score == 1
    assert (
        check_answer(answer.replace("helper(x) for", "abs(x) for").replace("map(helper", "map(abs"), **HUMAN_EVAL).score
        == 0
    )


def test_a_prompt_without_a_body_is_completed():
    assert "def f(x):\n    pass\n" in build_program("def f(x): return 1", "def f(x):\n", "f")


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
    checked = check_answer(answer)
    assert not any(part.held for part in checked.parts)
    assert all(part.found for part in checked.parts)
    assert not checked.error


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("x = 'a' * 2**33", "MemoryError"),
        ("open('big', 'w').write('x' * 10**8)", "File too large"),
        ("[open('/dev/null') for _ in range(200)]", "Too many open files"),
        ("import os; os.environ['MY_SECRET']", "KeyError"),
    ],
)
def test_limits(statement: str, problem: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    assert problem in check_answer(statement).parts[0].found


def test_a_file_may_be_written_where_the_program_runs_and_nothing_of_it_stays():
    before = set(os.listdir())
    assert check_answer("open('notes', 'w').write('x')\nprint('y' * 10**7)\n" + SQUARE).score == 1
    assert set(os.listdir()) == before


def test_a_program_that_does_not_end_is_killed_with_its_children():
    mark = f"mark{os.getpid()}"
    forks = f"import os, time\nfor _ in range(3):\n    os.fork()\nopen({mark!r}, 'w')\ntime.sleep(60) or {mark!r}\n"
    start = time.monotonic()
    checked = check_answer(forks, timeout=1)
    assert 1 <= time.monotonic() - start < 30
    assert checked.parts[0].found == "it took more than 1 s"
    passed_first = check_answer("def f(x):\n    while x == 3: pass\n    return x * x", timeout=1)
    assert [part.held for part in passed_first.parts] == [True, False]


REACHES = """
import gc, os, sys
SECRETS = []
def search(frame):
    while frame is not None:
        SECRETS.append(repr({**frame.f_globals, **frame.f_locals}))
        frame = frame.f_back
def f(x):
    search(sys._getframe())
    SECRETS.append(repr(gc.get_objects()))
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            SECRETS.append(open(f"/proc/{name}/cmdline").read())
        except OSError:
            pass
    return any("".join(["forty", "-", "two"]) in each for each in SECRETS)
"""
"""Searches its process and its machine for the text of the test."""


def test_a_program_does_not_see_its_tests():
    assert check_answer(REACHES, "assert f(2) is False, 'forty-two'").score == 1


AGREES = """
class Agrees:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __contains__(self, other): return True
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __sub__
    def __iter__(self): return iter([])
def f(x): return Agrees()
"""


CONTRADICTED = (
    "assert f(2) == 4",
    "assert 4 == f(2)",
    "assert not (f(2) != 4)",
    "assert f(2) < 5",
    "assert abs(f(2) - 4) < 1e-6",
    "assert 4 in f(2)",
    "assert f(2) in [4]",
    "assert type(f(2)) is int",
    "assert isinstance(f(2), int)",
    "import math\nassert math.isclose(f(2), 4)",
    "assert sorted(f(2)) == [4]",
)


IS_ITS_OWN_DIFFERENCE = """
class Agrees:
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __neg__ = __mul__ = __sub__
    def __abs__(self): return 0.0
    def __round__(self, digits=None): return 0
    def __float__(self): return 0.0
    def __bool__(self): return True
    def __lt__(self, other): return self
    __le__ = __gt__ = __ge__ = __lt__
def f(x): return Agrees()
"""
ABOUT_NUMBERS = (
    "assert abs(f(3.5) - 0.5) < 1e-6",
    "assert abs(-(f(3.5) - 0.5)) < 1e-6",
    "assert abs((f(3.5) - 0.5) * f(1)) < 1e-6",
    "assert round(f(3.5) - 0.5, 6) == 0",
    "assert float(4 - f(2)) == 0",
    "assert f(3) - 2",
    "assert f(3) > 2",
    "assert 0 < f(3) < 10",
    "assert max(f(1), 3) == 3",
)


@pytest.mark.parametrize(("answer", "tests"), [(AGREES, CONTRADICTED), (IS_ITS_OWN_DIFFERENCE, ABOUT_NUMBERS)])
def test_an_object_that_agrees_with_everything_passes_nothing(answer: str, tests: tuple[str, ...]):
    checked = check_answer(answer, *tests)
    assert [part.asks for part in checked.parts if part.held] == []
    assert len(checked.parts) == len(tests)


@pytest.mark.parametrize("names", ["[]", "['__builtins__', 'f']", "['f', 7]", "'f'"])
def test_an_answer_that_lies_about_its_names_replaces_none_of_pythons(names: str):
    lies = f"""
from align.reward.checkers import remote_calls
remote_calls.AnswerPeer.operations = lambda self, old=remote_calls.AnswerPeer.operations: {{
    **old(self), "names": lambda *rest: {names}
}}
def f(x): return 5
def abs(x): return 0
def isinstance(*x): return True
all = any = isinstance
"""
    tests = ("assert abs(f(2) - 4) < 1e-6", "assert isinstance(f(2), str)", "assert all([f(2) == 4])")
    assert [part.asks for part in check_answer(lies, *tests).parts if part.held] == []


def test_an_answer_does_not_change_the_words_of_a_test():
    replaced = "abs = lambda x: 0\nisinstance = lambda *x: True\nall = any = isinstance\ndef f(x): return 5\n"
    checked = check_answer(
        replaced, "assert abs(f(2) - 4) < 1e-6", "assert isinstance(f(2), str)", "assert all([f(2) == 4])"
    )
    assert [part.held for part in checked.parts] == [False] * 3
    assert (
        check_answer(
            "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 5", "assert abs(f(2) - 4) < 1"
        ).score
        == 0
    )
    assert check_answer("def sum(a, b): return a + b", "assert sum(10, 15) == 25").score == 1


def test_an_answer_that_ends_in_a_test_that_forgives_everything_has_not_passed():
    ends = "import os\ndef f(x): os._exit(0)"
    assert check_answer(ends, "try:\n    f(2)\nexcept BaseException:\n    pass", "assert True").score == 0


FORGES_A_VALUE = """
import json, os, struct
def f(x):
    for message in MESSAGES:
        content = json.dumps(message).encode()
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, struct.pack("!I", len(content)) + content)
            except OSError:
                pass
    os._exit(0)
"""


@pytest.mark.parametrize(
    "message",
    [
        {"request": {"operation": "call", "args": [{"builtin": "eval"}, "__import__('os')._exit(0)"], "kwargs": {}}},
        {"request": {"operation": "getattr", "args": [{"yours": 0}, "__globals__"], "kwargs": {}}},
        {"request": {"operation": "call", "args": [{"yours": 5}], "kwargs": {}}},
        {"response": {"value": {"builtin": "eval"}, "changed": []}},
        {"response": {"value": {"array": ["O", [1], "00"]}, "changed": []}},
        {"response": {"value": 4, "changed": [[9, []]]}},
        {"response": {"error": {"class": [[], "eval"], "args": ["1"], "text": ""}, "changed": []}},
        {"response": 4},
        {"something": 4},
        [4],
    ],
    ids=range(10),
)
def test_messages_that_are_none_end_the_test(message: Any):
    checked = check_answer(f"MESSAGES = [{message!r}]\n{FORGES_A_VALUE}", "assert f(2) == 4")
    assert checked.score == 0
    assert not checked.error


def test_a_function_of_pythons_own_runs_in_the_answers_process():
    assert (
        check_answer("f = sorted", "assert f([2, 1], key=lambda x: -x) == [2, 1]", "assert f([2, 1]) == [1, 2]").score
        == 1
    )
    assert check_answer("f = sum", "assert f([1, 2]) == 3", "assert f is not sum").score == 1
    forged = {"response": {"value": {"builtin": "eval"}, "changed": []}}
    checked = check_answer(f"MESSAGES = [{forged!r}]\n{FORGES_A_VALUE}", "assert f(2)('2 + 2') == 4")
    assert checked.parts[0].found == "it sent an invalid value"


STYLES = """
import asyncio, collections, contextlib, copy, dataclasses, enum, functools, math
import datetime
LIMIT = 3
calls = 0
memo = {}
class TooMuch(ValueError): pass
class FarTooMuch(TooMuch): pass
Point = collections.namedtuple("Point", "x y")
class Color(enum.Enum):
    RED = 1
@dataclasses.dataclass(order=True)
class Money:
    amount: int
    def __add__(self, other): return Money(self.amount + other.amount)
    def __mul__(self, by): return Money(self.amount * by)
class Stack(list):
    def push(self, x): self.append(x)
class Tree:
    def __init__(self, value, left=None, right=None): self.value, self.left, self.right = value, left, right
    def __iter__(self):
        if self.left: yield from self.left
        yield self.value
        if self.right: yield from self.right
    def __len__(self): return sum(1 for _ in self)
    def __getitem__(self, i): return list(self)[i]
    @property
    def depth(self): return 1 + max((each.depth for each in (self.left, self.right) if each), default=0)
def count():
    global calls
    calls += 1
    memo[calls] = [calls]
    return calls
def sort_in_place(xs): xs.sort()
def set_in(d): d["a"]["b"].append(1)
def same(x): return x
def apply(f, *xs, **named): return [f(x, **named) for x in xs]
def refuse(x):
    if x > LIMIT: raise TooMuch("too much", x)
    if x < 0: raise KeyError(x)
    return x
def numbers(n):
    for i in range(n): yield i
async def later(x):
    await asyncio.sleep(0)
    return x
@contextlib.contextmanager
def opened():
    yield 7
def greet(): print("hello")
def f(x):
    \"\"\"Square.

    >>> f(2)
    4
    \"\"\"
    return x * x
def big(): return 3 ** 500
def first(xs): return next(iter(xs))
def fold(f, xs): return functools.reduce(f, xs)
"""


WRITTEN = r"""
xs = [3, 1, 2]
assert sort_in_place(xs) is None and xs == [1, 2, 3]
---
d = {'a': {'b': []}}
inner = d['a']['b']
set_in(d)
assert inner == [1] and d['a']['b'] is inner
---
xs = [1]
assert same(xs) is xs
---
loop = []
loop.append(loop)
assert same(loop)[0] is loop
---
assert apply(lambda x, by=1: x * by, 1, 2, by=3) == [3, 6]
---
assert apply(lambda x: f(x) + 1, 2) == [5]
---
assert apply(str, 1) == ['1'] and apply(abs, -1) == [1]
---
assert fold(lambda a, b: a + b, [1, 2, 3]) == 6
---
def boom(x): raise IndexError('mine')
try:
    apply(boom, 1)
    assert 0
except IndexError as e:
    assert str(e) == 'mine'
---
assert first(x for x in [5, 6]) == 5
---
try:
    refuse(9)
    assert 0
except ValueError as e:
    assert e.args == ('too much', 9)
---
try:
    refuse(9)
    assert 0
except TooMuch:
    pass
---
assert issubclass(FarTooMuch, TooMuch)
---
import unittest
with unittest.TestCase().assertRaises(KeyError):
    refuse(-1)
---
class T(__import__('unittest').TestCase):
    def test(self):
        self.assertEqual(f(3), 9)
r = __import__('unittest').TestResult()
T('test').run(r)
assert r.wasSuccessful(), r.failures + r.errors
---
before = calls
assert count() == before + 1 == calls and memo[calls] == [calls]
---
assert list(numbers(3)) == [0, 1, 2] and sum(numbers(4)) == 6
---
import asyncio
assert asyncio.run(later(4)) == 4
---
with opened() as x:
    assert x == 7
---
import io, contextlib
out = io.StringIO()
with contextlib.redirect_stdout(out):
    greet()
assert out.getvalue() == 'hello\n'
---
import doctest
case = doctest.DocTestParser().get_doctest(f.__doc__, {'f': f}, 'f', None, 0)
runner = doctest.DocTestRunner()
runner.run(case, out=lambda text: None)
assert runner.summarize(False) == (0, 1)
---
assert big() == 3 ** 500
---
p = Point(1, 2)
assert p == (1, 2) and p.x == 1 and isinstance(p, tuple) and p[1] == 2
---
assert Color.RED == Color.RED and Color.RED.value == 1 and Color(1) is not None
---
assert Money(1) + Money(2) == Money(3) and Money(2) * 3 == Money(6) and Money(1) < Money(2)
---
assert Money(1) != Money(2) and len({Money.__name__, 'Money'}) == 1
---
m = Money(1)
m.amount = 5
assert m.amount == 5 and isinstance(m, Money) and not isinstance(3, Money)
---
s = Stack([1])
s.push(2)
assert s == [1, 2] and len(s) == 2 and s[-1] == 2 and 2 in s and s + [3] == [1, 2, 3]
---
t = Tree(2, Tree(1), Tree(3))
assert list(t) == [1, 2, 3] and len(t) == 3 and t[0] == 1 and t.depth == 2 and 3 in t
---
import answer
from answer import f as g
assert g(2) == answer.f(2) == 4
---
from answer import *
assert f(3) == 9
---
assert math.sqrt(f(3)) == 3
---
import datetime
from decimal import Decimal
values = datetime.date(2026, 1, 2), Decimal('1.5'), 1 + 2j, b'a', range(3), {1, 2}, frozenset('ab'), None, 'é\ud800'
for x in (*values, 1.5, (1, (2,)), datetime.timedelta(1, 2), ..., slice(1, 2)):
    assert same(x) == x and type(same(x)) is type(x)
---
import math as m
assert m.isnan(same(float('nan'))) and same(float('inf')) > 1e308
---
import numpy as np
x = np.arange(6.0).reshape(2, 3)
assert (same(x) == x).all() and same(np.int64(3)) == 3
---
class Own: pass
try:
    same(Own())
    assert 0
except TypeError as e:
    assert 'cannot be passed' in str(e)
---
from collections import Counter
assert same(Counter('aab')) == {'a': 2, 'b': 1}
""".strip().split("\n---\n")
"""Independent tests in the styles that people write."""


def test_tests_are_written_as_in_the_process_of_the_answer():
    checked = check_answer(STYLES, *WRITTEN)
    assert {part.asks: part.found for part in checked.parts if not part.held} == {}
    assert len(checked.parts) == len(WRITTEN)


def test_the_verdict_names_its_sandbox():
    assert check_answer(SQUARE).sandbox == sandbox.find_working_tier().name


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
        build_checker({"kind": "code", **spec}, "check", allow_code=True)
    assert caught.value.field == field
