"""Run the tests of an answer in a process that the answer cannot reach, with its names standing for objects of the
answer's process. Writes a line of JSON for each test: its number (-1 is the program) and the problem, empty if the test
passed; -2 and a reason if the answer's process ended; -3 if it was not started."""

from __future__ import annotations

import ast
import builtins
import json
import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

from align.reward.checkers.confinement import isolate_process
from align.reward.checkers.remote_calls import ConnectionEnded, Peer, RemoteObject, TestsPeer, describe_error

PROGRAM = -1
ENDED = -2
NOT_STARTED = -3


class TestGlobals(dict[str, Any]):
    """The global variables of the tests: their own, and the answer's, which are read from the answer's process.

    Functions and classes of the answer are bound once, so that copies of the names have them too; its other names are
    read when they are used. An answer may not replace `abs` or `len` for tests that use names of its own; a function
    called `sum` can still be tested by itself. The tests alone decide which of the two they are, for the answer may lie
    about its names.
    """

    def __init__(self, peer: Peer, sources: Sequence[str]) -> None:
        super().__init__(__name__="answer", __builtins__=builtins)
        self.peer = peer
        names = peer.call_remote("names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConnectionEnded("it sent an invalid list of names")
        self.hidden = set(dir(builtins)) if find_names_of_answer(sources) else set()
        for name in (name for name in names if not is_reserved(name)):
            value = None if name in self.hidden else peer.call_remote("global", name)
            if isinstance(value, type | types.ModuleType) or type(value) is RemoteObject:
                self[name] = value

    def __missing__(self, name: str) -> Any:
        if name in self.hidden or is_reserved(name):
            raise KeyError(name)  # Python then looks among its own names
        return self.peer.call_remote("global", name)


def find_names_of_answer(tests: Sequence[str]) -> set[str]:
    """Return the names that tests use but do not define, except Python's built-ins: an answer has to define them.

    Args:
        tests: source code.
    """
    nodes = [node for source in tests for node in ast.walk(ast.parse(source))]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    defined = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    defined |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    defined |= {(alias.asname or alias.name).partition(".")[0] for alias in imports}
    return used - defined - set(dir(builtins))


def is_reserved(name: str) -> bool:
    """Return whether a name begins and ends with two underscores, such as `__builtins__`."""
    return name.startswith("__") and name.endswith("__")


class AnswerModule(types.ModuleType):
    """The module that a test gets by `import answer`, whose attributes are read and set in the answer's process."""

    def __init__(self, peer: Peer) -> None:
        super().__init__("answer")
        self.__dict__["peer"] = peer

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [exported for exported in self.peer.call_remote("names") if not exported.startswith("_")]
        try:
            return self.peer.call_remote("global", name)
        except KeyError:
            raise AttributeError(f"module 'answer' has no attribute '{name}'") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        else:
            self.peer.call_remote("set_global", name, value)


def main(settings: Mapping[str, Any]) -> None:
    """Confine this process, send the program to the answer's process, run the tests on it, and report their problems.

    The job is read from stdin, and a line of JSON for each test is written to stdout. The process exits with status 0.

    Args:
        settings: see `confine_process`.
    """
    jobs, report = isolate_process(settings)
    with os.fdopen(jobs, "rb") as file:
        job = json.load(file)

    def report_problem(number: int, problem: str) -> None:
        os.write(report, (json.dumps([number, problem]) + "\n").encode())

    try:
        reading, writing = job["descriptors"]
        peer = TestsPeer(reading, writing)
        try:
            peer.receive()
        except ConnectionEnded:
            report_problem(NOT_STARTED, "the answer's process was not started")
            os._exit(0)
        peer.send(job["program"])
        problem = str(peer.receive())[:300]
        report_problem(PROGRAM, problem)
        if problem:
            os._exit(0)
        names = TestGlobals(peer, job["tests"])
        sys.modules["answer"] = AnswerModule(peer)
        for number, source in enumerate(job["tests"]):
            report_problem(number, run_test(source, names))
    except ConnectionEnded as error:
        report_problem(ENDED, str(error))
    finally:
        os._exit(0)


def run_test(source: str, names: TestGlobals) -> str:
    """Execute one test's source code, and return its error as text, or an empty text if it passed.

    Raises ConnectionEnded if the answer's process ended, even if the test caught that.
    """
    problem = ""
    try:
        exec(compile(source, "test.py", "exec"), names)
    except ConnectionEnded:
        raise
    except BaseException as error:
        problem = describe_error(error)
    if names.peer.ended:
        raise ConnectionEnded(names.peer.ended)
    return problem
