"""Several command lines in one go, `python -m align -`: the imports, seconds a stage, are paid once.

Each line still runs in a process of its own, so that its memory is its own and ends with it: a fork of one that has
imported what the lines need. A CUDA build of torch does not bear forking; there each line starts afresh.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from align.config.stages import STAGES
from align.errors import AlignError, InputError
from align.redaction import masked_argument

INTERRUPTED = 130
Command = Sequence[str]


def batch(lines: Iterable[str], check: Callable[[Command], object], run: Callable[[Command], int]) -> int:
    """Run command lines one after another, and stop at the first that fails.

    Args:
        lines: what would follow `python -m align`, quoted as in a shell; empty lines and `#` comments are passed over.
        check: raises where a command line is wrong; all are checked before the first one runs.
        run: one command line → its exit status.

    Returns:
        0, or the exit status of the line that failed.

    Raises:
        InputError: there is no line, one does not compose, or a quotation is left open.
    """
    commands: list[Command] = []
    for number, line in enumerate(lines, 1):
        try:
            if words := split(line):
                check(words)
                commands.append(words)
        except AlignError as error:
            print(f"align: line {number} of standard input is wrong, and nothing was run", file=sys.stderr)
            raise error
    if not commands:
        raise InputError("standard input", "(empty)", "holds no command line", "Write one a line: stage=sft …")
    start = fork if imported(commands) else spawn
    for number, words in enumerate(commands, 1):
        print(f"\n[{number} of {len(commands)}] {shlex.join(map(masked_argument, words))}", flush=True)
        if status := start(words, run):
            return status
    return 0


def split(line: str) -> list[str]:
    """The words of a line, quoted as in a shell."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise InputError(
            "standard input", line.strip(), f"cannot be split ({error})", "Close the quotation."
        ) from error


def imported(commands: Sequence[Command]) -> bool:
    """Import what the stages of these lines need, if this process can be forked afterwards; say whether."""
    if not sys.platform.startswith("linux"):
        return False
    import torch

    if torch.version.cuda is not None:
        return False
    for stage in dict.fromkeys(w.removeprefix("stage=") for words in commands for w in words if w.startswith("stage=")):
        if stage in STAGES:  # any other is refused when its line is composed
            importlib.import_module(f"align.stages.{STAGES[stage].module}")
    importlib.import_module("align.report.plots")  # every one of them ends with a report
    gc.collect()
    gc.freeze()  # or a child's collector would touch, and so copy, every page
    return True


def fork(words: Command, run: Callable[[Command], int]) -> int:
    """One line in a fork of this process. Signals reach the fork: Ctrl-C by the terminal, SIGTERM passed on."""

    def work() -> NoReturn:
        sys.exit(run(words))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        child.join()
    except KeyboardInterrupt:
        child.join()
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return status(child.exitcode or 0)


def spawn(words: Command, run: Callable[[Command], int]) -> int:
    """One line in a new process."""
    return status(subprocess.run([sys.executable, "-m", "align", *words], stdin=subprocess.DEVNULL).returncode)


def status(code: int) -> int:
    """A process's exit status as a shell counts it: one that signal 9 killed has 137."""
    return code if code >= 0 else 128 - code
