"""Parallel execution of `stage=data`: runners of independent tasks, and writing of parts of sources by workers.

Tasks run in this process, or by Daft in processes of this machine or of a Ray cluster. A task, its function and its
result are pickled. Workers see the same files at the same paths.

Workers write parts of a source in any order. Afterwards `SourceImport.run` takes the parts in order and writes the
missing ones. If a worker fails on a part, it leaves the part out, and `SourceImport.run` meets the same error. So
errors and their order do not depend on the workers.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from itertools import groupby, takewhile
from pathlib import Path
from socket import gethostname
from typing import Any, NamedTuple, TypeVar

import numpy as np

import align
from align.core.errors import InputError, require
from align.data.read.rows import count_rows, is_seekable
from align.data.sets import gather
from align.data.sets.gather import SourceImport

T = TypeVar("T")
R = TypeVar("R")
NO_TELEMETRY = {"DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0"}
"""Environment variables that disable telemetry: Daft calls two hosts when it is imported, and Ray reports its use."""
RUNNER_ALREADY_SET = "Cannot set runner more than once"
"""Daft's message if the process has set a runner before."""
FIELD = "stage.engine"
OWN_PROCESS = "Start the run in a process of its own."
PIECES = 32
"""Maximum number of pieces of one file of plain lines, Parquet or Arrow. A piece has to skip the rows before it, which
costs nearly nothing in these formats."""
PACKED_PIECES = 4
"""Maximum number of pieces of a compressed file, a table or an array, in which skipping takes a few percent of the
work."""
FAILED_SUFFIX = ".failed"
"""Suffix of a marker file of a failed part. Other workers do not write the parts after it."""
SEEN_WITHIN = 60.0
"""Maximum seconds to wait for a file of a worker: a network file system may show it up to a minute later."""
PAUSE = 0.5
"""Seconds between two checks for a file."""


class TaskRunner:
    """A runner that calls a function for each of several independent tasks, one after another in this process.

    Attributes:
        workers: number of tasks that run at once.
    """

    workers: int = 1

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        """Yield the number of each task and the result of `function` for the task, in any order."""
        return enumerate(map(function, tasks))


in_process_runner = TaskRunner()


class DaftRunner(TaskRunner):
    """A runner of tasks in worker processes of Daft, on this machine or on a Ray cluster. Tasks are rows of a data
    frame, in batches of one.

    Args:
        on_ray: whether the processes run on a Ray cluster, or on this machine.
        workers: largest number of processes; None for the number of processors.
        address: address of the cluster; None for one on this machine, which ends with this process.

    Raises:
        InputError: Daft or Ray is not installed, or cannot be used.
    """

    def __init__(self, on_ray: bool, workers: int | None, address: str | None) -> None:
        os.environ.update(NO_TELEMETRY)
        os.environ["PYTHONPATH"] = os.pathsep.join(list_module_paths())  # for processes that are started later
        self.daft = import_or_raise("daft")
        self.on_ray = on_ray
        self.workers = workers or os.cpu_count() or 1
        if on_ray:
            ray = connect_ray(address, None if address else workers)
            self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        runner = "ray" if on_ray else "native"
        value = "ray" if on_ray else "daft"
        try:
            if on_ray:
                self.daft.set_runner_ray(address, noop_if_initialized=True)
            else:
                self.daft.set_runner_native()
        except (RuntimeError, OSError, ValueError) as error:
            if RUNNER_ALREADY_SET not in str(error):
                raise InputError(FIELD, value, f"Daft refuses it ({error})", OWN_PROCESS) from error
        problem = "this process uses Daft's other engine already"
        require(self.daft.get_or_infer_runner_type() == runner, FIELD, value, problem, OWN_PROCESS)

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        if not tasks:
            return
        daft = self.daft
        pickled_function = pickle_function(function)
        rows = [pickle.dumps(numbered) for numbered in enumerate(tasks)]
        batch = daft.method.batch(return_dtype=daft.DataType.binary(), batch_size=1)
        worker = type("Worker", (TaskWorker,), {"run": batch(TaskWorker.run)})
        use_process = None if self.on_ray else True
        workers = daft.cls(worker, max_concurrency=min(self.workers, len(rows)), use_process=use_process, cpus=1)
        frame = daft.from_pydict({"task": rows})
        if self.on_ray:
            frame = frame.into_partitions(len(rows))
        frame = frame.select(
            workers(pickled_function, os.getcwd(), list_module_paths()).run(frame["task"]).alias("result")
        )
        for row in frame.iter_rows():
            yield unpickle_result(row["result"])


@cache
def connect_ray(address: str | None, processors: int | None) -> Any:
    """Connect to the Ray cluster at `address`, or start one on this machine if no address is given, and return the
    module `ray`.
    A process has one cluster.

    Raises:
        InputError: Ray is not installed, this process uses another cluster, or the connection fails.
    """
    ray = import_or_raise("ray")
    value = address or "(this machine)"
    problem = "this process has joined another Ray cluster already"
    require(not ray.is_initialized(), "stage.ray", value, problem, OWN_PROCESS)
    local_options = {} if address else {"num_cpus": processors, "include_dashboard": False}
    try:
        ray.init(address or "local", logging_level="ERROR", log_to_driver=False, **local_options)
    except (RuntimeError, OSError, ValueError) as error:
        remedy = "Check that the cluster runs, and that this machine reaches it."
        raise InputError("stage.ray", value, f"cannot be joined ({error})", remedy) from error
    return ray


class StartFailure(NamedTuple):
    """The result that a worker which cannot start returns for each of its tasks."""

    host: str
    reason: str


class TaskWorker:
    """A process that runs tasks, in the working folder and with the module paths of the main process."""

    def __init__(self, function: bytes, folder: str, modules: Sequence[str]) -> None:
        self.failure: StartFailure | None = None
        try:
            os.chdir(folder)
            sys.path += [place for place in modules if place not in sys.path]
            self.function: Callable[[Any], Any] = pickle.loads(function)
        except (OSError, ImportError, AttributeError) as error:  # an error here would be hidden in Daft's traceback
            self.failure = StartFailure(gethostname(), str(error))

    def run(self, task: Any) -> list[bytes]:
        if self.failure:
            return [pickle.dumps(self.failure)] * len(task)
        numbered_tasks = map(pickle.loads, task.to_pylist())
        return [pickle.dumps((number, self.function(value))) for number, value in numbered_tasks]


def unpickle_result(pickled: bytes) -> tuple[int, Any]:
    """Unpickle the number of a task and its result, or raise InputError if the worker could not start.

    Raises:
        InputError: The worker could not start.
    """
    result = pickle.loads(pickled)
    if isinstance(result, StartFailure):
        problem = f"a worker on {result.host} cannot begin ({result.reason})"
        remedy = "Give every machine the same environment, and the working folder at the same path."
        raise InputError(FIELD, "(workers)", problem, remedy)
    return result


def pickle_function(function: Callable[[Any], Any]) -> bytes:
    """Pickle a function for worker processes, or raise InputError if it cannot be pickled."""
    try:
        return pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        remedy = "Define what stage.clean names by `def` in a module, or use stage.engine=embedded."
        raise InputError(FIELD, "(work)", f"cannot send its work to other processes ({error})", remedy) from error


def list_module_paths() -> list[str]:
    """Return the absolute folders from which this process imports modules, with the folder of this package first."""
    paths = [Path(align.__file__).parents[1], *(Path(place).absolute() for place in sys.path)]
    return [*dict.fromkeys(map(str, paths))]


def import_or_raise(name: str) -> Any:
    """Import and return a module, or raise InputError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        remedy = "Install it as docs/data.md describes, and run the command in that environment."
        raise InputError(FIELD, name, f"is not installed here ({error})", remedy) from error


class PartsTask(NamedTuple):
    """Consecutive parts of one source for a worker to write."""

    source: int
    parts: tuple[int, ...]


class TaskResult(NamedTuple):
    """The parts that a worker has written for a task, and the part that failed with the reason."""

    task: PartsTask
    parts: list[int]
    failed: int | None = None
    reason: str = ""


class RowCount(NamedTuple):
    """The number of rows of a file and a flag for cheap skipping, or the reason why the rows could not be counted."""

    rows: int
    skips_cheaply: bool
    reason: str = ""


def write_parts_in_workers(
    runner: TaskRunner,
    imports: Sequence[SourceImport],
    report_progress: Callable[[int, int], None] = lambda written, total: None,
) -> None:
    """Write the missing parts of all file sources in worker processes, as far as the rows of the files can be counted.
    Parts that fail are noted in the imports.

    Args:
        report_progress: called with the number of parts that are written, and the number of all.

    Raises:
        InputError: Workers write to a folder that this process cannot see.
    """
    # Only files: the key of an annotation project stays in this process.
    imports_by_number = {source_import.number: source_import for source_import in imports if source_import.source.path}
    files = [
        (number, source_import.source.field, file)
        for number, source_import in imports_by_number.items()
        for file in source_import.source.files
    ]
    counts = dict(runner(count_file_rows, files))
    tasks = list[PartsTask]()
    counted_files = 0
    for number, of_source in groupby(range(len(files)), key=lambda i: files[i][0]):
        file_counts = [*takewhile(lambda count: not count.reason, map(counts.__getitem__, of_source))]
        counted_files += len(file_counts)
        source_import = imports_by_number[number]
        source_import.file_row_counts = [count.rows for count in file_counts]
        tasks += [
            PartsTask(number, parts) for parts in iter_missing_parts(split_parts(file_counts), source_import.parts())
        ]
    if uncounted := [(path, counts[i].reason) for i, (*_, path) in enumerate(files) if counts[i].reason]:
        path, reason = uncounted[0]  # workers do not read the files after it either
        print(
            f"files that this process has to read itself: {len(files) - counted_files} of {len(files)}. "
            f"A worker could not count the rows of {path}: {reason}",
            flush=True,
        )
    folder = imports[0].spool.folder
    for marker in folder.glob(f"*{FAILED_SUFFIX}"):  # of an interrupted run
        marker.unlink()
    written_parts = 0
    total = sum(len(task.parts) for task in tasks)
    failures = dict[int, dict[int, str]]()
    for _, result in runner(partial(write_task_parts, imports_by_number), tasks):
        wait_for_files([folder / f"{imports_by_number[result.task.source].name(part)}.json" for part in result.parts])
        if result.failed is not None:
            failures.setdefault(result.task.source, {})[result.failed] = result.reason
        written_parts += len(result.parts)
        report_progress(written_parts, total)
    for number, reasons in failures.items():
        imports_by_number[number].failed = reasons


def wait_for_files(paths: Sequence[Path]) -> None:
    """Wait until this process sees all files that workers have written, or raise InputError after `SEEN_WITHIN`
    seconds.

    Raises:
        InputError: A file is not seen within `SEEN_WITHIN`.
    """
    end = time.monotonic() + SEEN_WITHIN
    for path in paths:
        while not os.path.exists(path):  # unlike Path.exists, it raises no error of a network file system
            if time.monotonic() > end:
                problem = f"workers write to a folder that this process cannot see ({path.name} is missing)"
                remedy = "Give all of them one file system, with the sources and run.root at the same paths."
                raise InputError(FIELD, "(workers)", problem, remedy)
            time.sleep(PAUSE)


def count_file_rows(file: tuple[int, str, Path]) -> RowCount:
    """Count the rows of a file, and return an error as the reason instead of raising it."""
    _, field, path = file
    try:
        return RowCount(count_rows(path, field), is_seekable(path, field))
    except (InputError, OSError) as error:
        return RowCount(0, False, str(error))


def split_parts(counts: Sequence[RowCount]) -> Iterator[range]:
    """Split the part numbers of a source into ranges for workers. Each range begins in one file, and large files have
    several.

    Args:
        counts: rows of each file.
    """
    ends = np.cumsum([count.rows for count in counts], dtype=np.int64)
    total = -(-int(ends[-1]) // gather.PART) if len(ends) else 0
    begins_in = np.searchsorted(ends, np.arange(total) * gather.PART, "right").tolist()
    for file, parts in groupby(range(total), key=begins_in.__getitem__):
        file_parts = [*parts]
        size = -(-len(file_parts) // (PIECES if counts[file].skips_cheaply else PACKED_PIECES))
        for start in range(0, len(file_parts), size):
            yield range(file_parts[start], file_parts[min(start + size, len(file_parts)) - 1] + 1)


def iter_missing_parts(pieces: Iterator[range], existing: set[int]) -> Iterator[tuple[int, ...]]:
    """Yield runs of consecutive part numbers that are in a piece and not in `existing`."""
    for piece in pieces:
        for exists, parts in groupby(piece, key=existing.__contains__):
            if not exists:
                yield tuple(parts)


def write_task_parts(imports: Mapping[int, SourceImport], task: PartsTask) -> TaskResult:
    """Write the parts of a task to disk until one fails, and return the numbers of the written parts and of the failed
    one. A failed part is marked by a file, so that other workers stop too.

    Args:
        imports: number of a source → its import.
    """
    source_import = imports[task.source]
    written_parts = list[int]()
    for part in task.parts:
        marker_path = source_import.spool.folder / f"{source_import.name(part)}{FAILED_SUFFIX}"
        try:
            if any(marker.name < marker_path.name for marker in marker_path.parent.glob(f"*{FAILED_SUFFIX}")):
                return TaskResult(task, written_parts)
            part_counts = source_import.write(part)
        except (InputError, OSError) as error:
            create_marker(marker_path)
            return TaskResult(task, written_parts, part, str(error))
        written_parts.append(part)
        if part_counts["bad_rows"] and not source_import.skips:
            create_marker(marker_path)
            return TaskResult(task, written_parts)
    return TaskResult(task, written_parts)


def create_marker(marker_path: Path) -> None:
    """Create the marker file of a failed part, so that other workers skip the parts after it. This only saves work, so
    errors are ignored."""
    with suppress(OSError):
        marker_path.touch()
