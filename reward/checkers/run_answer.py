"""Run an answer's program in the sandbox, and do what the tests ask of it. This process may do anything: nothing that
it sends is more than a value."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping
from typing import Any

from align.reward.checkers.confinement import isolate_process
from align.reward.checkers.remote_calls import AnswerPeer, ConnectionEnded, describe_error


def main(settings: Mapping[str, Any]) -> None:
    """Confine this process, run the answer's program, and serve the tests' calls on it over stdin and stdout.

    The process exits with status 0 when the tests end.

    Args:
        settings: see `confine_process`.
    """
    reading, writing = isolate_process(settings)
    module = sys.modules["answer"] = types.ModuleType("answer")
    peer = AnswerPeer(reading, writing, module)
    peer.send("ready")
    program = peer.receive()
    try:
        problem = ""
        try:
            exec(compile(program, "answer.py", "exec"), module.__dict__)
        except ConnectionEnded:
            raise
        except BaseException as error:
            problem = describe_error(error)
        peer.send(problem)
        peer.wait_for_response()
    finally:
        os._exit(0)
