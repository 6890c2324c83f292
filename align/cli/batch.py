"""Several command lines in one go: those of `python -m align -`, and the jobs of a sweep (`-m`). The imports, seconds a
stage, are paid once.

Each line still runs in a process of its own, so that its memory is its own and ends with it: a fork of one that has
imported what the lines need. A build of torch for CUDA or ROCm does not bear forking; there each line starts afresh.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from align.config.options import OPENED
from align.core.distribution import missing_modules
from align.core.errors import NOT_PASSED, AlignError, InputError
from align.core.redaction import masked_argument
from align.run import Manifest, read_manifest
from align.stages import preload

INTERRUPTED = 130
WIDEST = 120
"""Columns of a table that no terminal bounds."""
GAP = 2
LONGEST = 32
"""Letters of a value that the table shows: the last ones, where paths differ."""
FIGURES = 2
"""Figures that the table shows however wide it gets."""

Command = Sequence[str]
Opened = Callable[[Path], object]
"""Is told the folder of a run when it is opened."""
Run = Callable[[Command, Opened], int]
"""One command line → its exit status."""


class Ended(NamedTuple):
    """Attributes:
    status: exit status of one line.
    folder: that of its run; None where it opened none.
    """

    status: int
    folder: Path | None


def batch(lines: Iterable[str], check: Callable[[Command], Iterable[str]], run: Run) -> int:
    """Run command lines one after another, and stop at the first that fails.

    Args:
        lines: what would follow `python -m align`, quoted as in a shell; empty lines and `#` comments are passed over.
        check: a command line → the stages that it runs; raises where it is wrong. All are checked before the first
            one runs.
        run: runs one.

    Returns:
        0, or the exit status of the line that failed.

    Raises:
        InputError: there is no line, one does not compose, or a quotation is left open.
    """
    commands: list[Command] = []
    stages: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        try:
            if words := split(line):
                stages |= dict.fromkeys(check(words))
                commands.append(words)
        except AlignError as error:
            print(f"align: line {number} of standard input is wrong, and nothing was run", file=sys.stderr)
            raise error
    if not commands:
        raise InputError("standard input", "(empty)", "holds no command line", "Write one a line: stage=sft …")
    start = starter(stages)
    for number, words in enumerate(commands, 1):
        if status := announced(number, len(commands), words, start, run).status:
            return status
    return 0


def sweep(jobs: Sequence[tuple[Command, Mapping[str, str]]], stages: Iterable[str], run: Run) -> int:
    """Run the jobs of a sweep one after another, whatever becomes of each, and print a table of them.

    Args:
        jobs: command line, and key → value of what it has of its own.
        stages: those that they run.

    Returns:
        The highest exit status of a job. One that is interrupted ends the sweep: the same command goes on with it.
    """
    start, ended = starter(stages), list[Ended]()
    for number, (words, _) in enumerate(jobs, 1):
        ended.append(announced(number, len(jobs), words, start, run))
        if ended[-1].status == INTERRUPTED:
            break
    print(f"\n{table([swept for _, swept in jobs], ended)}", flush=True)
    for line in side_by_side(ended):
        print(f"\n{line}", flush=True)
    return max(one.status for one in ended)


def split(line: str) -> list[str]:
    """The words of a line, quoted as in a shell."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise InputError(
            "standard input", line.strip(), f"cannot be split ({error})", "Close the quotation."
        ) from error


Start = Callable[[Command, Run], Ended]


def announced(number: int, of: int, words: Command, start: Start, run: Run) -> Ended:
    print(f"\n[{number} of {of}] {shlex.join(map(masked_argument, words))}", flush=True)
    return start(words, run)


def starter(stages: Iterable[str]) -> Start:
    return fork if imported(stages) else spawn


def imported(stages: Iterable[str]) -> bool:
    """Import what these stages need, if this process can be forked afterwards; say whether."""
    if not sys.platform.startswith("linux"):
        return False
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    preload(stages)
    importlib.import_module("align.report.plots")  # every one of them ends with a report
    if not missing_modules("plots"):
        importlib.import_module("matplotlib.figure")
    gc.collect()
    gc.freeze()  # or a child's collector would touch, and so copy, every page
    return True


def fork(words: Command, run: Run) -> Ended:
    """One line in a fork of this process."""
    reads, writes = os.pipe()

    def work() -> NoReturn:
        sys.exit(run(words, note_in(writes)))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    os.close(writes)
    interrupted = waited(child.join, child.terminate)
    return Ended(INTERRUPTED if interrupted else status(child.exitcode or 0), noted(reads))


def spawn(words: Command, run: Run) -> Ended:
    """One line in a new process."""
    reads, writes = os.pipe()
    command = [sys.executable, "-m", "align", *words]
    environment = os.environ | {OPENED: str(writes)}
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[writes])
    os.close(writes)
    interrupted = waited(child.wait, child.terminate)
    return Ended(INTERRUPTED if interrupted else status(child.returncode), noted(reads))


def waited(wait: Callable[[], object], terminate: Callable[[], None]) -> bool:
    """Wait until a child has ended by itself: it has things to write down. Signals reach it: Ctrl-C by the terminal,
    SIGTERM passed on. Says whether this process was interrupted."""
    before = signal.signal(signal.SIGTERM, lambda *_: terminate())
    try:
        wait()
    except KeyboardInterrupt:
        wait()
        return True
    finally:
        signal.signal(signal.SIGTERM, before)
    return False


def note_in(descriptor: int) -> Opened:
    """Writes a run's folder down for whoever started this process."""
    return lambda folder: os.write(descriptor, os.fsencode(folder.absolute()))


def noted(descriptor: int) -> Path | None:
    """What `note_in` wrote, once its process has ended. Nobody waits for others that still hold the other end."""
    os.set_blocking(descriptor, False)
    try:
        return Path(os.fsdecode(name)) if (name := os.read(descriptor, 1 << 16)) else None
    except BlockingIOError:
        return None
    finally:
        os.close(descriptor)


def status(code: int) -> int:
    """A process's exit status as a shell counts it: one that signal 9 killed has 137."""
    return code if code >= 0 else 128 - code


def table(swept: Sequence[Mapping[str, str]], ended: Sequence[Ended]) -> str:
    """The jobs of a sweep: what each had of its own, what became of it, the figures that done ones have in common and
    that tell them apart, and its folder. Figures that do not fit beside the rest are named above."""
    manifests = [manifest_of(one) for one in ended]
    keys = list(dict.fromkeys(key for job in swept for key in job))
    columns = [[key.lstrip("+"), *(displayed_value(key, job) for job in swept)] for key in keys]
    left_out = ["not run"] * (len(swept) - len(ended))
    columns.append(["status", *(words_for(one.status) for one in ended), *left_out])
    folders = ["folder", *(displayed(one.folder) for one in ended), *("" for _ in left_out)]
    room = shutil.get_terminal_size((WIDEST, 24)).columns - sum(map(width, [*columns, folders]))
    more, figures = [], 0
    for name, values in figures_in([m.metrics for m in manifests if m and m.done]).items():
        given = iter(values)
        cells = [format_number(next(given)) if m and m.done else "" for m in manifests]
        column = [name, *cells, *("" for _ in left_out)]
        if (width(column) <= room or figures < FIGURES) and not more:
            figures += 1
            columns.append(column)
            room -= width(column)
        else:
            more.append(name)
    rows = zip(*([cell.ljust(width(c) - GAP) for cell in c] for c in columns), folders, strict=True)
    note = [f"more in each manifest.json: {', '.join(more)}"] if more else []
    return "\n".join([*note, *((" " * GAP).join(row).rstrip() for row in rows)])


def side_by_side(ended: Sequence[Ended]) -> list[str]:
    """A line that names the page on which the done jobs of a sweep are compared; none of fewer than two."""
    from align.registry.comparison_page import sweep_page

    folders = [job.folder.absolute() for job in ended if job.status in (0, NOT_PASSED) and job.folder]
    try:
        page = sweep_page(folders)
    except Exception as error:  # the runs are done, whatever becomes of the page
        return [f"no page that compares them: {error if isinstance(error, AlignError) else repr(error)}"]
    return [f"curves and figures side by side: {displayed(page)}"] if page else []


def manifest_of(job: Ended) -> Manifest | None:
    with suppress(AlignError, OSError):
        return read_manifest(job.folder) if job.folder else None
    return None


def displayed_value(key: str, job: Mapping[str, str]) -> str:
    text = masked_argument(f"{key}={job.get(key, '')}").partition("=")[2]
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"


def words_for(status: int) -> str:
    ends = {0: "done", INTERRUPTED: "interrupted", NOT_PASSED: "done, gates not passed"}
    return ends.get(status, f"failed ({status})")


def displayed(folder: Path | None) -> str:
    here = Path.cwd()
    return "" if folder is None else str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def width(column: Sequence[str]) -> int:
    return max(map(len, column)) + GAP


def figures_in(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Name → its value in each, of the numbers that all have, but for those that are the same everywhere. Of one with
    an interval, the value. What weighs most comes first."""
    from align.report.figure_labels import by_weight

    found = {}
    for name in by_weight(metrics[0] if metrics else ()):
        values = [m.get(name) for m in metrics]
        values = [v.get("value") if isinstance(v, Mapping) else v for v in values]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(metrics) and (len(metrics) == 1 or len({*numbers}) > 1):
            found[name] = numbers
    return found


def format_number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
