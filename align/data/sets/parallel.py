"""Work of `stage=data` in many processes: where tasks run that do not need each other, and parts of sources made ahead.

Tasks run in this process, or in many, of this machine or a Ray cluster, by Daft. A task, its function and what it gives
travel as pickles. Workers see the same files at the same paths.

A worker takes rows from anywhere in a source, and a part is the same whoever makes it. Afterwards `Gathering.run` takes
the parts in order and makes those that are missing. A worker that meets an error does not raise it: it leaves the part
out, and `Gathering.run` meets the same error. So errors, and their order, do not depend on the workers.
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
"""Daft calls two hosts when it is imported, and Ray reports its use, unless the environment says no by then."""
CHOSEN = "Cannot set runner more than once"
"""What Daft says if a process has chosen before where it runs."""
FIELD = "stage.engine"
OWN_PROCESS = "Start the run in a process of its own."
PIECES, PACKED_PIECES = 32, 4
"""Of one file at most. Each begins by passing over what is before it, which costs nearly nothing in plain lines,
Parquet and Arrow, and a few hundredths of all other work in a file that is packed, a table or an array."""
FAILED = ".failed"
"""Ending of what a worker leaves behind if it failed, so that no other works on what is behind that."""
SEEN_WITHIN, PAUSE = 60.0, 0.5
"""Seconds. A network file system may show a file that another machine wrote up to a minute later."""


class TaskRunner:
    """Runs tasks that do not need each other: in this process, one after another.

    Attributes:
        workers: how many run at once.
    """

    workers: int = 1

    def __call__(self, do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        """Yield the number of each task and what `do` gives for it, in any order."""
        return enumerate(map(do, tasks))


embedded = TaskRunner()


class DaftRunner(TaskRunner):
    """Runs them in processes of Daft's: tasks are rows of a data frame, in batches of one.

    Args:
        on_ray: they are those of a Ray cluster; without, of this machine.
        workers: processes that work at once; None for as many as there are processors.
        address: of the cluster; None for one on this machine, which ends with this process.

    Raises:
        InputError: Daft or Ray is not installed, or cannot be used.
    """

    def __init__(self, on_ray: bool, workers: int | None, address: str | None) -> None:
        os.environ.update(SILENT)
        os.environ["PYTHONPATH"] = os.pathsep.join(module_paths())  # for processes that are started from here on
        self.daft = imported("daft")
        self.on_ray = on_ray
        self.workers = workers or os.cpu_count() or 1
        if on_ray:
            ray = joined(address, None if address else workers)
            self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        runner, value = ("ray", "ray") if on_ray else ("native", "daft")
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
        work = packed(do)
        rows = [pickle.dumps(numbered) for numbered in enumerate(tasks)]
        batch = daft.method.batch(return_dtype=daft.DataType.binary(), batch_size=1)
        worker = type("Worker", (Worker,), {"run": batch(Worker.run)})
        own = None if self.on_ray else True
        workers = daft.cls(worker, max_concurrency=min(self.workers, len(rows)), use_process=own, cpus=1)
        frame = daft.from_pydict({"task": rows})
        if self.on_ray:
            frame = frame.into_partitions(len(rows))
        frame = frame.select(workers(work, os.getcwd(), module_paths()).run(frame["task"]).alias("result"))
        for row in frame.iter_rows():
            yield result(row["result"])


@cache
def joined(address: str | None, processors: int | None) -> Any:
    """Return Ray, with a cluster that this process joins, or starts on this machine. A process has one.

    Raises:
        InputError: Ray is not installed; or this process has another cluster; or this one cannot be joined.
    """
    ray = imported("ray")
    value = address or "(this machine)"
    problem = "this process has joined another Ray cluster already"
    require(not ray.is_initialized(), "stage.ray", value, problem, OWN_PROCESS)
    here = {} if address else {"num_cpus": processors, "include_dashboard": False}
    try:
        ray.init(address or "local", logging_level="ERROR", log_to_driver=False, **here)
    except (RuntimeError, OSError, ValueError) as error:
        remedy = "Check that the cluster runs, and that this machine reaches it."
        raise InputError("stage.ray", value, f"cannot be joined ({error})", remedy) from error
    return ray


class Unable(NamedTuple):
    """What a worker that cannot begin gives for each task."""

    host: str
    why: str


class Worker:
    """A process that runs tasks, in the folder and with the modules of the one that gives them."""

    def __init__(self, do: bytes, folder: str, modules: Sequence[str]) -> None:
        self.unable: Unable | None = None
        try:
            os.chdir(folder)
            sys.path += [place for place in modules if place not in sys.path]
            self.do: Callable[[Any], Any] = pickle.loads(do)
        except (OSError, ImportError, AttributeError) as error:  # raised here, it would end in Daft's traceback
            self.unable = Unable(gethostname(), str(error))

    def run(self, task: Any) -> list[bytes]:
        if self.unable:
            return [pickle.dumps(self.unable)] * len(task)
        numbered = map(pickle.loads, task.to_pylist())
        return [pickle.dumps((number, self.do(given))) for number, given in numbered]


def result(pickled: bytes) -> tuple[int, Any]:
    """Return the number of a task and what it gave.

    Raises:
        InputError: its worker could not begin.
    """
    given = pickle.loads(pickled)
    if isinstance(given, Unable):
        problem = f"a worker on {given.host} cannot begin ({given.why})"
        remedy = "Give every machine the same environment, and the working folder at the same path."
        raise InputError(FIELD, "(workers)", problem, remedy)
    return given


def packed(do: Callable[[Any], Any]) -> bytes:
    """Return a function as workers get it. Raises InputError if another process cannot find a part of it."""
    try:
        return pickle.dumps(do)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        remedy = "Define what stage.clean names by `def` in a module, or use stage.engine=embedded."
        raise InputError(FIELD, "(work)", f"cannot send its work to other processes ({error})", remedy) from error


def module_paths() -> list[str]:
    """Return where modules are found, this package among them."""
    paths = [Path(align.__file__).parents[1], *(Path(place).absolute() for place in sys.path)]
    return [*dict.fromkeys(map(str, paths))]


def imported(name: str) -> Any:
    """Return a module. Raises InputError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        remedy = "Make the environment that docs/data.md tells of, and run it there."
        raise InputError(FIELD, name, f"is not installed here ({error})", remedy) from error


class Task(NamedTuple):
    """Consecutive parts of one source."""

    source: int
    parts: tuple[int, ...]


class Made(NamedTuple):
    """What became of a task: the parts that were made, and which one was not, and why."""

    task: Task
    parts: list[int]
    failed: int | None = None
    why: str = ""


class Count(NamedTuple):
    """The rows of a file, and whether they are passed over at hardly any cost; or why they could not be counted."""

    rows: int
    cheap: bool
    why: str = ""


def make_ahead(
    engine: TaskRunner, gatherings: Sequence[Gathering], done: Callable[[int, int], None] = lambda made, of: None
) -> None:
    """Make the parts of all sources that are files, as far as they can be counted.

    Args:
        done: gets how many parts are made, and of how many.

    Raises:
        InputError: workers write to a folder that this process cannot see.
    """
    of_files = {gathering.number: gathering for gathering in gatherings if gathering.source.path}  # no project's key
    files = [
        (number, gathering.source.field, file)
        for number, gathering in of_files.items()
        for file in gathering.source.files
    ]
    counts = dict(engine(count_file, files))
    tasks = list[Task]()
    read = 0
    for number, of_source in groupby(range(len(files)), key=lambda i: files[i][0]):
        known = [*takewhile(lambda count: not count.why, map(counts.__getitem__, of_source))]
        read += len(known)
        gathering = of_files[number]
        gathering.known = [count.rows for count in known]
        tasks += [Task(number, parts) for parts in missing(pieces(known), gathering.parts())]
    if uncounted := [(path, counts[i].why) for i, (*_, path) in enumerate(files) if counts[i].why]:
        path, why = uncounted[0]  # a file behind one that could not be counted is not read by workers either
        print(
            f"files that this process reads without workers: {len(files) - read} of {len(files)}. "
            f"A worker could not count the rows of {path}: {why}",
            flush=True,
        )
    folder = gatherings[0].spool.folder
    for left in folder.glob(f"*{FAILED}"):  # by a run that was cut off
        left.unlink()
    made = 0
    total = sum(len(task.parts) for task in tasks)
    failed = dict[int, dict[int, str]]()
    for _, result in engine(partial(work, of_files), tasks):
        wait_for([folder / f"{of_files[result.task.source].name(part)}.json" for part in result.parts])
        if result.failed is not None:
            failed.setdefault(result.task.source, {})[result.failed] = result.why
        made += len(result.parts)
        done(made, total)
    for number, of_source in failed.items():
        of_files[number].failed = of_source


def wait_for(paths: Sequence[Path]) -> None:
    """Return when all files of workers are seen here.

    Raises:
        InputError: one of them is not seen within `SEEN_WITHIN`.
    """
    end = time.monotonic() + SEEN_WITHIN
    for path in paths:
        while not os.path.exists(path):  # unlike Path.exists, of no error of a network file system an exception
            if time.monotonic() > end:
                problem = f"workers write to a folder that this process cannot see ({path.name} is missing)"
                remedy = "Give all of them one file system, with the sources and run.root at the same paths."
                raise InputError(FIELD, "(workers)", problem, remedy)
            time.sleep(PAUSE)


def count_file(file: tuple[int, str, Path]) -> Count:
    """Return the rows of a file, or why they cannot be counted."""
    _, field, path = file
    try:
        return Count(count_rows(path, field), is_seekable(path, field))
    except (InputError, OSError) as error:
        return Count(0, False, str(error))


def pieces(counts: Sequence[Count]) -> Iterator[range]:
    """Yield the parts of a source with such files, in pieces that each begin in another file, or at another place in
    one."""
    ends = np.cumsum([count.rows for count in counts], dtype=np.int64)
    total = -(-int(ends[-1]) // gather.PART) if len(ends) else 0
    begins_in = np.searchsorted(ends, np.arange(total) * gather.PART, "right").tolist()
    for file, parts in groupby(range(total), key=begins_in.__getitem__):
        of_file = [*parts]
        size = -(-len(of_file) // (PIECES if counts[file].cheap else PACKED_PIECES))
        for at in range(0, len(of_file), size):
            yield range(of_file[at], of_file[min(at + size, len(of_file)) - 1] + 1)


def missing(wanted: Iterator[range], there: set[int]) -> Iterator[tuple[int, ...]]:
    """Yield runs of parts that are not there."""
    for piece in wanted:
        for is_there, parts in groupby(piece, key=there.__contains__):
            if not is_there:
                yield tuple(parts)


def work(gatherings: Mapping[int, Gathering], task: Task) -> Made:
    """Make the parts of a task, up to one that fails.

    Args:
        gatherings: by the number of the source.
    """
    gathering = gatherings[task.source]
    made = list[int]()
    for part in task.parts:
        mark = gathering.spool.folder / f"{gathering.name(part)}{FAILED}"
        try:
            if any(other.name < mark.name for other in mark.parent.glob(f"*{FAILED}")):
                return Made(task, made)
            account = gathering.write(part)
        except (InputError, OSError) as error:
            leave_mark(mark)
            return Made(task, made, part, str(error))
        made.append(part)
        if account["bad_rows"] and not gathering.skips:
            leave_mark(mark)
            return Made(task, made)
    return Made(task, made)


def leave_mark(mark: Path) -> None:
    """Keep others from what is behind. They would only work in vain, so a folder that takes no mark is no error."""
    with suppress(OSError):
        mark.touch()
