"""Where tasks run that do not need each other: in this process, or in many, of this machine or a Ray cluster, by Daft.

A task, its function and what it gives travel as pickles. Workers see the same files at the same paths.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from socket import gethostname
from typing import Any, NamedTuple, Protocol, TypeVar

import align
from align.errors import InputError, require

T = TypeVar("T")
R = TypeVar("R")
SILENT = {"DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0", "DAFT_PROGRESS_BAR": "0"}
"""Daft calls two hosts when it is imported, and Ray reports its use, unless the environment says no by then."""
CHOSEN = "Cannot set runner more than once"
"""What Daft says where a process has chosen before where it runs."""
FIELD, REMEDY = "stage.engine", "Make the environment that docs/data.md tells of, and run it there."


class Engine(Protocol):
    """Runs tasks that do not need each other.

    Attributes:
        workers: how many run at once.
    """

    workers: int

    def __call__(self, do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        """The number of each task and what `do` gives for it, in any order."""
        ...


class Embedded:
    """Runs them in this process, one after another."""

    workers = 1

    def __call__(self, do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        return enumerate(map(do, tasks))


embedded = Embedded()


class Daft:
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
        os.environ["PYTHONPATH"] = os.pathsep.join(places())  # for processes that are started from here on
        self.daft, self.on_ray = imported("daft"), on_ray
        self.workers = workers or os.cpu_count() or 1
        if on_ray:
            ray = joined(address, None if address else workers)
            self.workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.choose_runner(address)

    def choose_runner(self, address: str | None) -> None:
        """Raises: InputError: Daft refuses it, or this process has chosen the other one before."""
        asked, value = ("ray", "ray") if self.on_ray else ("native", "daft")
        problem, remedy = "this process uses Daft's other engine already", "Start the run in a process of its own."
        try:
            if self.on_ray:
                self.daft.set_runner_ray(address, noop_if_initialized=True)
            else:
                self.daft.set_runner_native()
        except (RuntimeError, OSError, ValueError) as error:
            if CHOSEN not in str(error):
                raise InputError(FIELD, value, f"Daft refuses it ({error})", remedy) from error
        require(self.daft.get_or_infer_runner_type() == asked, FIELD, value, problem, remedy)

    def __call__(self, do: Callable[[T], R], tasks: Sequence[T]) -> Iterator[tuple[int, R]]:
        if not tasks:
            return
        daft, work, rows = self.daft, packed(do), [pickle.dumps(numbered) for numbered in enumerate(tasks)]
        batch = daft.method.batch(return_dtype=daft.DataType.binary(), batch_size=1)
        worker = type("Worker", (Worker,), {"run": batch(Worker.run)})
        most, own = min(self.workers, len(rows)), None if self.on_ray else True
        made = daft.cls(worker, max_concurrency=most, use_process=own, cpus=1)
        found = daft.from_pydict({"task": rows})
        if self.on_ray:
            found = found.into_partitions(len(rows))
        found = found.select(made(work, os.getcwd(), places()).run(found["task"]).alias("result"))
        for row in found.iter_rows():
            yield result(row["result"])


@cache
def joined(address: str | None, processors: int | None) -> Any:
    """Ray, with a cluster that this process joins, or starts on this machine. A process has one.

    Raises:
        InputError: Ray is not installed; or this process has another cluster; or this one cannot be joined.
    """
    ray, value = imported("ray"), address or "(this machine)"
    remedy = "Start the run in a process of its own."
    require(not ray.is_initialized(), "stage.ray", value, "this process has joined another Ray cluster already", remedy)
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
        return [pickle.dumps((number, self.do(one))) for number, one in numbered]


def result(made: bytes) -> tuple[int, Any]:
    """The number of a task and what it gave.

    Raises:
        InputError: its worker could not begin.
    """
    found = pickle.loads(made)
    if isinstance(found, Unable):
        problem = f"a worker on {found.host} cannot begin ({found.why})"
        remedy = "Give every machine the same environment, and the working folder at the same path."
        raise InputError(FIELD, "(workers)", problem, remedy)
    return found


def packed(do: Callable[[Any], Any]) -> bytes:
    """Raises: InputError: a part of it is nothing that another process can find."""
    try:
        return pickle.dumps(do)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        remedy = "Define what stage.clean names by `def` in a module, or use stage.engine=embedded."
        raise InputError(FIELD, "(work)", f"cannot send its work to other processes ({error})", remedy) from error


def places() -> list[str]:
    """Where modules are found, this package among them."""
    return [
        *dict.fromkeys([str(Path(align.__file__).parents[1]), *(str(Path(place).absolute()) for place in sys.path)])
    ]


def imported(name: str) -> Any:
    """Raises: InputError: it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(FIELD, name, f"is not installed here ({error})", REMEDY) from error
