"""Parallel execution of `stage=data`: runners of independent tasks, and writing of parts of sources by workers.

Tasks run in this process, or by Daft in processes of this machine or of a Ray cluster. A task, its function and its
result are pickled. Workers see the same files at the same paths.

Workers write parts of a source in any order. Afterwards `Gathering.run` takes the parts in order and writes the missing
ones. If a worker fails on a part, it leaves the part out, and `Gathering.run` meets the same error. So errors and their
order do not depend on the workers.
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
from align.data.sets.gather import Gathering

T = TypeVar("T")
R = TypeVar("R")
SILENT = {"DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0"}
"""Environment that disables telemetry: Daft calls two hosts when it is imported, and Ray reports its use."""
CHOSEN = "Cannot set runner more than once"
"""Daft's message if the process has set a runner before."""
FIELD = "stage.engine"
OWN_PROCESS = "Start the run in a process of its own."
PIECES = 32
"""Largest number of pieces of one file of plain lines, Parquet or Arrow. A piece has to skip the rows before it, which
costs nearly nothing in these formats."""
PACKED_PIECES = 4
"""Largest number of pieces of a compressed file, a table or an array, in which skipping takes a few percent of the
work."""
FAILED = ".failed"
"""Suffix of a marker file of a failed part. Other workers do not write the parts behind it."""
SEEN_WITHIN = 60.0
"""Seconds to wait for a file of a worker: a network file system may show it up to a minute later."""
PAUSE = 0.5
"""Seconds between two checks for a file."""


class TaskRunner:
    """A runner of independent tasks, one after another in this process.

    Attributes:
        workers: number of tasks that run at once.
    """

    workers: int = 1

    def __call__(self, do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        """Yield the number of each task and the result of `do` for it, in any order."""
        return enumerate(map(do, tasks))


embedded = TaskRunner()


class DaftRunner(TaskRunner):
    """A runner of tasks in processes of Daft. Tasks are rows of a data frame, in batches of one.

    Args:
        on_ray: whether the processes run on a Ray cluster, or on this machine.
        workers: largest number of processes; None for the number of processors.
        address: address of the cluster; None for one on this machine, which ends with this process.

    Raises:
        InputError: Daft or Ray is not installed, or cannot be used.
    """

    def __init__(self, on_ray: bool, workers: int | None, address: str | None) -> None:
        os.environ.update(SILENT)
        os.environ["PYTHONPATH"] = os.pathsep.join(module_paths())  # for processes that are started later
        self.daft = imported("daft")
        self.on_ray = on_ray
        self.workers = workers or os.cpu_count() or 1
        if on_ray:
            ray = joined(address, None if address else workers)
            self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        runner = "ray" if on_ray else "native"
        value = "ray" if on_ray else "daft"
        try:
            if on_ray:
                self.daft.set_runner_ray(address, noop_if_initialized=True)
            else:
                self.daft.set_runner_native()
        except (RuntimeError, OSError, ValueError) as error:
            if CHOSEN not in str(error):
                raise InputError(FIELD, value, f"Daft refuses it ({error})", OWN_PROCESS) from error
        problem = "this process uses Daft's other engine already"
        require(self.daft.get_or_infer_runner_type() == runner, FIELD, value, problem, OWN_PROCESS)

    def __call__(self, do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        if not tasks:
            return
        daft = self.daft
        pickled_function = packed(do)
        rows = [pickle.dumps(numbered) for numbered in enumerate(tasks)]
        batch = daft.method.batch(return_dtype=daft.DataType.binary(), batch_size=1)
        worker = type("Worker", (Worker,), {"run": batch(Worker.run)})
        use_process = None if self.on_ray else True
        workers = daft.cls(worker, max_concurrency=min(self.workers, len(rows)), use_process=use_process, cpus=1)
        frame = daft.from_pydict({"task": rows})
        if self.on_ray:
            frame = frame.into_partitions(len(rows))
        frame = frame.select(workers(pickled_function, os.getcwd(), module_paths()).run(frame["task"]).alias("result"))
        for row in frame.iter_rows():
            yield result(row["result"])


@cache
def joined(address: str | None, processors: int | None) -> Any:
    """Connect to a Ray cluster, or start one on this machine. Returns the module `ray`. A process has one cluster.

    Raises:
        InputError: Ray is not installed, this process uses another cluster, or the connection fails.
    """
    ray = imported("ray")
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


class Unable(NamedTuple):
    """The result of each task of a worker that cannot start."""

    host: str
    why: str


class Worker:
    """A process that runs tasks, in the working folder and with the module paths of the main process."""

    def __init__(self, do: bytes, folder: str, modules: Sequence[str]) -> None:
        self.unable: Unable | None = None
        try:
            os.chdir(folder)
            sys.path += [place for place in modules if place not in sys.path]
            self.do: Callable[[Any], Any] = pickle.loads(do)
        except (OSError, ImportError, AttributeError) as error:  # an error here would be hidden in Daft's traceback
            self.unable = Unable(gethostname(), str(error))

    def run(self, task: Any) -> list[bytes]:
        if self.unable:
            return [pickle.dumps(self.unable)] * len(task)
        numbered_tasks = map(pickle.loads, task.to_pylist())
        return [pickle.dumps((number, self.do(value))) for number, value in numbered_tasks]


def result(pickled: bytes) -> tuple[int, Any]:
    """Unpickle the number of a task and its result.

    Raises:
        InputError: The worker could not start.
    """
    numbered_result = pickle.loads(pickled)
    if isinstance(numbered_result, Unable):
        problem = f"a worker on {numbered_result.host} cannot begin ({numbered_result.why})"
        remedy = "Give every machine the same environment, and the working folder at the same path."
        raise InputError(FIELD, "(workers)", problem, remedy)
    return numbered_result


def packed(do: Callable[[Any], Any]) -> bytes:
    """Pickle a function for workers. Raises InputError if it cannot be pickled."""
    try:
        return pickle.dumps(do)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        remedy = "Define what stage.clean names by `def` in a module, or use stage.engine=embedded."
        raise InputError(FIELD, "(work)", f"cannot send its work to other processes ({error})", remedy) from error


def module_paths() -> list[str]:
    """Return the paths of modules, including this package."""
    paths = [Path(align.__file__).parents[1], *(Path(place).absolute() for place in sys.path)]
    return [*dict.fromkeys(map(str, paths))]


def imported(name: str) -> Any:
    """Import a module. Raises InputError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        remedy = "Make the environment that docs/data.md tells of, and run it there."
        raise InputError(FIELD, name, f"is not installed here ({error})", remedy) from error


class Task(NamedTuple):
    """Consecutive parts of one source for a worker to write."""

    source: int
    parts: tuple[int, ...]


class Made(NamedTuple):
    """The result of a task: the parts that were written, the part that failed, and the reason."""

    task: Task
    parts: list[int]
    failed: int | None = None
    why: str = ""


class Count(NamedTuple):
    """The number of rows of a file and whether skipping rows is cheap; or the reason why they could not be counted."""

    rows: int
    cheap: bool
    why: str = ""


def make_ahead(
    engine: TaskRunner, gatherings: Sequence[Gathering], done: Callable[[int, int], None] = lambda made, of: None
) -> None:
    """Write the missing parts of all sources that are files, as far as their rows can be counted.

    Args:
        done: called with the number of parts that are written, and the number of all.

    Raises:
        InputError: Workers write to a folder that this process cannot see.
    """
    of_files = {
        gathering.number: gathering for gathering in gatherings if gathering.source.path
    }  # a project's key stays in this process
    files = [
        (number, gathering.source.field, file)
        for number, gathering in of_files.items()
        for file in gathering.source.files
    ]
    counts = dict(engine(count_file, files))
    tasks = list[Task]()
    counted_files = 0
    for number, of_source in groupby(range(len(files)), key=lambda i: files[i][0]):
        file_counts = [*takewhile(lambda count: not count.why, map(counts.__getitem__, of_source))]
        counted_files += len(file_counts)
        gathering = of_files[number]
        gathering.known = [count.rows for count in file_counts]
        tasks += [Task(number, parts) for parts in missing(pieces(file_counts), gathering.parts())]
    if uncounted := [(path, counts[i].why) for i, (*_, path) in enumerate(files) if counts[i].why]:
        path, why = uncounted[0]  # workers do not read the files behind it either
        print(
            f"files that this process reads without workers: {len(files) - counted_files} of {len(files)}. "
            f"A worker could not count the rows of {path}: {why}",
            flush=True,
        )
    folder = gatherings[0].spool.folder
    for marker in folder.glob(f"*{FAILED}"):  # of an interrupted run
        marker.unlink()
    written = 0
    total = sum(len(task.parts) for task in tasks)
    failed = dict[int, dict[int, str]]()
    for _, result in engine(partial(work, of_files), tasks):
        wait_for([folder / f"{of_files[result.task.source].name(part)}.json" for part in result.parts])
        if result.failed is not None:
            failed.setdefault(result.task.source, {})[result.failed] = result.why
        written += len(result.parts)
        done(written, total)
    for number, reasons in failed.items():
        of_files[number].failed = reasons


def wait_for(paths: Sequence[Path]) -> None:
    """Wait until this process sees all files of workers.

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


def count_file(file: tuple[int, str, Path]) -> Count:
    """Count the rows of a file. An error is returned as the reason."""
    _, field, path = file
    try:
        return Count(count_rows(path, field), is_seekable(path, field))
    except (InputError, OSError) as error:
        return Count(0, False, str(error))


def pieces(counts: Sequence[Count]) -> Iterator[range]:
    """Split the parts of a source into pieces for workers. Each piece begins in one file, and large files have several.

    Args:
        counts: rows of each file.
    """
    ends = np.cumsum([count.rows for count in counts], dtype=np.int64)
    total = -(-int(ends[-1]) // gather.PART) if len(ends) else 0
    begins_in = np.searchsorted(ends, np.arange(total) * gather.PART, "right").tolist()
    for file, parts in groupby(range(total), key=begins_in.__getitem__):
        file_parts = [*parts]
        size = -(-len(file_parts) // (PIECES if counts[file].cheap else PACKED_PIECES))
        for start in range(0, len(file_parts), size):
            yield range(file_parts[start], file_parts[min(start + size, len(file_parts)) - 1] + 1)


def missing(pieces: Iterator[range], existing: set[int]) -> Iterator[tuple[int, ...]]:
    """Yield runs of consecutive parts that do not exist."""
    for piece in pieces:
        for exists, parts in groupby(piece, key=existing.__contains__):
            if not exists:
                yield tuple(parts)


def work(gatherings: Mapping[int, Gathering], task: Task) -> Made:
    """Write the parts of a task until one fails.

    Args:
        gatherings: number of a source → its import.
    """
    gathering = gatherings[task.source]
    written_parts = list[int]()
    for part in task.parts:
        marker_path = gathering.spool.folder / f"{gathering.name(part)}{FAILED}"
        try:
            if any(marker.name < marker_path.name for marker in marker_path.parent.glob(f"*{FAILED}")):
                return Made(task, written_parts)
            account = gathering.write(part)
        except (InputError, OSError) as error:
            leave_mark(marker_path)
            return Made(task, written_parts, part, str(error))
        written_parts.append(part)
        if account["bad_rows"] and not gathering.skips:
            leave_mark(marker_path)
            return Made(task, written_parts)
    return Made(task, written_parts)


def leave_mark(marker_path: Path) -> None:
    """Create a marker file, so that other workers skip the parts behind it. This only saves work, so errors are
    ignored."""
    with suppress(OSError):
        marker_path.touch()
