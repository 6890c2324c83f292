"""Run several command lines: those of `python -m align -`, and the jobs of a sweep (`-m`).

Each line runs in a process of its own, which frees its memory. The process is a fork of one that has imported the
modules of the stages that the lines run, so that imports, seconds a stage, are paid once. With a build of torch for
CUDA or ROCm, which does not support forks, each line starts a new process.
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
from align.core.distribution import find_missing_modules
from align.core.errors import NOT_PASSED, AlignError, InputError
from align.core.redaction import mask_argument
from align.run import Manifest, read_manifest
from align.stages import preload

INTERRUPTED = 130
STATUS_NAMES = {0: "done", INTERRUPTED: "interrupted", NOT_PASSED: "done, gates not passed"}
WIDEST = 120
"""Width of the results table if there is no terminal, in characters."""
GAP = 2
LONGEST = 32
"""Characters of a value in the table: the last ones, because paths differ there."""
FIGURES = 2
"""Figures that the table always shows, whatever its width."""

Command = Sequence[str]
Opened = Callable[[Path], object]
"""Called with a run's folder when the run starts to write there."""
Run = Callable[[Command, Opened], int]
"""Runs a command line, calls the second argument with the run's folder, and returns the exit status."""


class JobResult(NamedTuple):
    """The exit status and run folder of one command line.

    Attributes:
        status: its exit status.
        folder: the folder of its run; None if it opened none.
    """

    status: int
    folder: Path | None


def run_batch(lines: Iterable[str], check: Callable[[Command], Iterable[str]], run: Run) -> int:
    """Run command lines one after another in processes of their own, and stop at the first that fails.

    Args:
        lines: the arguments of `python -m align`, quoted as in a shell. Empty lines and `#` comments are skipped.
        check: checks a command line and returns the stages that it runs. All lines are checked before one runs.

    Returns:
        0, or the exit status of the line that failed.

    Raises:
        InputError: there is no line, or one is wrong.
    """
    commands: list[Command] = []
    stages: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        try:
            if words := split_line(line):
                stages |= dict.fromkeys(check(words))
                commands.append(words)
        except AlignError as error:
            print(f"align: line {number} of standard input is invalid, and nothing was run", file=sys.stderr)
            raise error
    if not commands:
        raise InputError("standard input", "(empty)", "holds no command line", "Write one a line: stage=sft …")
    start = choose_start(stages)
    for number, words in enumerate(commands, 1):
        if status := announce_and_run(number, len(commands), words, start, run).status:
            return status
    return 0


def run_sweep(jobs: Sequence[tuple[Command, Mapping[str, str]]], stages: Iterable[str], run: Run) -> int:
    """Run the jobs of a hyperparameter sweep one after another, even if some fail, and print a table of their results.

    An interruption ends the sweep; the same command continues it.

    Args:
        jobs: the command line of each job, and the values of its swept keys.
        stages: the stages that they run.

    Returns:
        the highest exit status of a job.
    """
    start = choose_start(stages)
    results: list[JobResult] = []
    for number, (words, _) in enumerate(jobs, 1):
        results.append(announce_and_run(number, len(jobs), words, start, run))
        if results[-1].status == INTERRUPTED:
            break
    print(f"\n{format_table([swept for _, swept in jobs], results)}", flush=True)
    for line in format_comparison(results):
        print(f"\n{line}", flush=True)
    return max(job.status for job in results)


def split_line(line: str) -> list[str]:
    """Split a line of standard input into arguments as a shell does, or raise InputError if a quotation is not
    closed."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        problem = f"cannot be split ({error})"
        raise InputError("standard input", line.strip(), problem, "Close the quotation.") from error


Start = Callable[[Command, Run], JobResult]


def announce_and_run(number: int, of: int, words: Command, start: Start, run: Run) -> JobResult:
    print(f"\n[{number} of {of}] {shlex.join(map(mask_argument, words))}", flush=True)
    return start(words, run)


def choose_start(stages: Iterable[str]) -> Start:
    return run_in_fork if try_import_for_forks(stages) else run_in_new_process


def try_import_for_forks(stages: Iterable[str]) -> bool:
    """Import the modules of these stages if this process can be forked, and return whether it can. It cannot on another
    system than Linux, or with a torch build for CUDA or ROCm."""
    if not sys.platform.startswith("linux"):
        return False
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    preload(stages)
    importlib.import_module("align.report.plots")  # every stage ends with a report
    if not find_missing_modules("plots"):
        importlib.import_module("matplotlib.figure")
    gc.collect()
    gc.freeze()  # keeps the collector of a child from touching, and so copying, every page
    return True


def run_in_fork(words: Command, run: Run) -> JobResult:
    """Run one command line in a fork of this process and return its exit status and run folder."""
    reads, writes = os.pipe()

    def work() -> NoReturn:
        sys.exit(run(words, build_folder_writer(writes)))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    os.close(writes)
    interrupted = wait_for_child(child.join, child.terminate)
    return JobResult(INTERRUPTED if interrupted else to_shell_status(child.exitcode or 0), read_folder(reads))


def run_in_new_process(words: Command, run: Run) -> JobResult:
    """Run one command line in a new Python process and return its exit status and run folder."""
    reads, writes = os.pipe()
    command = [sys.executable, "-m", "align", *words]
    environment = os.environ | {OPENED: str(writes)}
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[writes])
    os.close(writes)
    interrupted = wait_for_child(child.wait, child.terminate)
    return JobResult(INTERRUPTED if interrupted else to_shell_status(child.returncode), read_folder(reads))


def wait_for_child(wait: Callable[[], object], terminate: Callable[[], None]) -> bool:
    """Wait until a child process has ended, and return True if Ctrl-C interrupted this process while it waited.

    An interrupted child still saves its state. It gets Ctrl-C from the terminal; SIGTERM is passed on.
    """
    before = signal.signal(signal.SIGTERM, lambda *_: terminate())
    try:
        wait()
    except KeyboardInterrupt:
        wait()
        return True
    finally:
        signal.signal(signal.SIGTERM, before)
    return False


def build_folder_writer(descriptor: int) -> Opened:
    """Return a function that writes a run folder's absolute path to a pipe, given the pipe's file descriptor."""
    return lambda folder: os.write(descriptor, os.fsencode(folder.absolute()))


def read_folder(descriptor: int) -> Path | None:
    """Read from a pipe the run folder that a child process wrote there, and close the pipe. Returns None if it wrote
    none.

    Does not wait for other processes that hold the pipe open.
    """
    os.set_blocking(descriptor, False)
    try:
        return Path(os.fsdecode(name)) if (name := os.read(descriptor, 1 << 16)) else None
    except BlockingIOError:
        return None
    finally:
        os.close(descriptor)


def to_shell_status(code: int) -> int:
    """Convert the exit code of a Python subprocess to that of a shell, such as -9 to 137 for a process killed by signal
    9."""
    return code if code >= 0 else 128 - code


def format_table(swept: Sequence[Mapping[str, str]], results: Sequence[JobResult]) -> str:
    """Return a text table of a sweep's jobs: swept values, status, metrics that differ between finished jobs, and
    folder.

    Figures that do not fit into the width are named above the table.
    """
    manifests = [read_job_manifest(result) for result in results]
    keys = list(dict.fromkeys(key for job in swept for key in job))
    columns = [[key.lstrip("+"), *(display_value(key, job) for job in swept)] for key in keys]
    not_run = ["not run"] * (len(swept) - len(results))
    columns.append(["status", *(STATUS_NAMES.get(job.status, f"failed ({job.status})") for job in results), *not_run])
    folders = ["folder", *(display_path(result.folder) for result in results), *("" for _ in not_run)]
    room = shutil.get_terminal_size((WIDEST, 24)).columns - sum(map(compute_column_width, [*columns, folders]))
    omitted = []
    figures = 0
    for name, values in find_differing_figures([m.metrics for m in manifests if m and m.done]).items():
        remaining_values = iter(values)
        cells = [format_figure(next(remaining_values)) if m and m.done else "" for m in manifests]
        column = [name, *cells, *("" for _ in not_run)]
        if (compute_column_width(column) <= room or figures < FIGURES) and not omitted:
            figures += 1
            columns.append(column)
            room -= compute_column_width(column)
        else:
            omitted.append(name)
    rows = zip(*([cell.ljust(compute_column_width(c) - GAP) for cell in c] for c in columns), folders, strict=True)
    note = [f"more in each manifest.json: {', '.join(omitted)}"] if omitted else []
    return "\n".join([*note, *((" " * GAP).join(row).rstrip() for row in rows)])


def format_comparison(results: Sequence[JobResult]) -> list[str]:
    """Write the HTML page that compares the finished jobs of a sweep, and return a line with its path in a list. The
    list is empty if there is nothing to compare. If the page fails, the line says why."""
    from align.registry.comparison_page import write_sweep_page

    folders = [job.folder.absolute() for job in results if job.status in (0, NOT_PASSED) and job.folder]
    try:
        page = write_sweep_page(folders)
    except Exception as error:  # the runs are done, even if there is no page
        return [f"no page that compares them: {error if isinstance(error, AlignError) else repr(error)}"]
    return [f"curves and figures side by side: {display_path(page)}"] if page else []


def read_job_manifest(job: JobResult) -> Manifest | None:
    with suppress(AlignError, OSError):
        return read_manifest(job.folder) if job.folder else None
    return None


def display_value(key: str, job: Mapping[str, str]) -> str:
    text = mask_argument(f"{key}={job.get(key, '')}").partition("=")[2]
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"


def display_path(folder: Path | None) -> str:
    working_folder = Path.cwd()
    if folder is None:
        return ""
    return str(folder.relative_to(working_folder) if folder.is_relative_to(working_folder) else folder)


def compute_column_width(column: Sequence[str]) -> int:
    return max(map(len, column)) + GAP


def find_differing_figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the numeric metrics that all jobs have and that differ between them, as name → one value per job, the most
    important first.

    A figure with an interval counts by its value.
    """
    from align.report.figure_labels import sort_metric_names

    figures = {}
    for name in sort_metric_names(metrics[0] if metrics else ()):
        values = [m.get(name) for m in metrics]
        values = [v.get("value") if isinstance(v, Mapping) else v for v in values]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(metrics) and (len(metrics) == 1 or len({*numbers}) > 1):
            figures[name] = numbers
    return figures


def format_figure(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
