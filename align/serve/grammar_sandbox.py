"""Compile a grammar in a process of its own, under a time limit."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from threading import Lock

TRIAL_S = 0.5
"""A grammar takes a few milliseconds, a large one 100."""
START_S = 10.0
TOO_MUCH = "it takes too long or too much memory to compile"
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 30_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Of `llguidance.LLParserLimits`. A step that reaches its limits takes about 10 ms, and ends its request."""

# Answers each line, a grammar, with a line: what is wrong with it. A first line says that it has begun.
SCRIPT = """
import json, resource, sys
from llguidance import LLMatcher, LLParserLimits
limits = LLParserLimits(**json.loads(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
print('""', flush=True)
for line in sys.stdin:
    seconds = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    grammar = LLMatcher.grammar_from_lark(json.loads(line))
    print(json.dumps(LLMatcher.validate_grammar(grammar, limits=limits)), flush=True)
"""


class Trial:
    """Says what is wrong with grammars. Safe to share between threads, which take turns. The process is started for the
    first grammar, and again after one that ended it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, lark: str) -> str:
        """llguidance's message on a grammar that it refuses, `TOO_MUCH`, or nothing."""
        with self._lock:
            try:
                process = self._process or self._started()
                assert process.stdin is not None
                process.stdin.write(json.dumps(lark).encode() + b"\n")
                process.stdin.flush()
                return json.loads(answer(process, TRIAL_S))
            except (TimeoutError, BrokenPipeError):
                self._end()
                return TOO_MUCH

    def close(self) -> None:
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(LIMITS)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        answer(self._process, START_S)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def answer(process: subprocess.Popen[bytes], within_s: float) -> bytes:
    """A line of a process.

    Raises:
        TimeoutError: there was none in time, or the process has ended.
    """
    assert process.stdout is not None
    until = time.monotonic() + within_s
    read = b""
    while not read.endswith(b"\n"):
        ready = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]
        piece = process.stdout.read(2**16) if ready else b""
        if not piece:
            raise TimeoutError
        read += piece
    return read
