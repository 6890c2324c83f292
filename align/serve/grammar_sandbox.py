"""Compilation of untrusted grammars in a separate process, with limits on time and memory."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from threading import Lock

COMPILE_TIMEOUT_S = 0.5
"""Time limit of one compilation in seconds. Usual grammars take a few milliseconds, large ones 100."""
START_TIMEOUT_S = 10.0
TOO_MUCH = "it takes too long or too much memory to compile"
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 30_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Arguments of `llguidance.LLParserLimits`. A step that reaches a limit takes about 10 ms, and fails its request."""

# Prints an empty line when it has started; then, for each line of input (a grammar), a line with its error.
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


class GrammarSandbox:
    """A checker of untrusted grammars, which compiles them in a subprocess with limits on time and memory.

    Threads may share it, and take turns. The subprocess is started for the first grammar, and again after a grammar
    that killed it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, lark: str) -> str:
        """Compile a grammar in the subprocess, and return llguidance's error, or an empty string if it is valid.

        Returns `TOO_MUCH` if a limit on time or memory is exceeded.
        """
        with self._lock:
            try:
                process = self._process or self._start()
                assert process.stdin is not None
                process.stdin.write(json.dumps(lark).encode() + b"\n")
                process.stdin.flush()
                return json.loads(read_line(process, COMPILE_TIMEOUT_S))
            except (TimeoutError, BrokenPipeError):
                self._end()
                return TOO_MUCH

    def close(self) -> None:
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-c", SCRIPT, json.dumps(LIMITS)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        read_line(self._process, START_TIMEOUT_S)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """Read the next line of a process's standard output, or raise TimeoutError after `timeout_s` seconds.

    Raises:
        TimeoutError: no line came in time, or the process has ended.
    """
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    output = b""
    while not output.endswith(b"\n"):
        ready = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
        chunk = process.stdout.read(2**16) if ready else b""
        if not chunk:
            raise TimeoutError
        output += chunk
    return output
