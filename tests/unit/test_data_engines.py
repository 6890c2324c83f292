"""Tests that failures of workers, Daft and Ray are errors of one line.

`benchmarks/data/engines.py` runs Daft and Ray, which need an environment of their own.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import gethostname
from typing import Any

import pyarrow as pa
import pytest

from align.core.errors import InputError
from align.data.sets.parallel import NO_TELEMETRY, DaftRunner, TaskWorker, connect_ray, pickle_function, unpickle_result


def test_work_that_no_other_process_can_find_is_refused() -> None:
    with pytest.raises(InputError, match=r"stage\.engine=\(work\): cannot send its work .*Define what stage\.clean"):
        pickle_function(lambda task: task)


def test_a_worker_without_the_working_folder_is_no_traceback(tmp_path: Path) -> None:
    worker = TaskWorker(pickle_function(len), str(tmp_path / "gone"), [])
    (pickled_result,) = worker.run(pa.array([pickle.dumps((0, "task"))]))
    message = (
        rf"a worker on {re.escape(gethostname())} cannot begin \(.*No such file.*gone.*working folder at the same path"
    )
    with pytest.raises(InputError, match=message):
        unpickle_result(pickled_result)


def test_a_worker_without_a_module_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "only_here.py").write_text("def clean(task):\n    return task * 2\n")
    pickled_function = pickle_function(importlib.import_module("only_here").clean)
    (pickled_result,) = TaskWorker(pickled_function, str(tmp_path), []).run(pa.array([pickle.dumps((3, "ab"))]))
    assert unpickle_result(pickled_result) == (3, "abab")
    monkeypatch.delitem(sys.modules, "only_here")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])
    (pickled_result,) = TaskWorker(pickled_function, str(tmp_path), []).run(pa.array([pickle.dumps((3, "ab"))]))
    with pytest.raises(InputError, match=r"cannot begin \(No module named 'only_here'\).*the same environment"):
        unpickle_result(pickled_result)


class Stub:
    """Stand-in for the parts of Daft and Ray that choose where Daft runs. Neither is installed for the tests."""

    def __init__(self, runner: str = "", initialised: bool = False, refuses: Exception | None = None) -> None:
        self.runner = runner
        self.initialised = initialised
        self.refuses = refuses
        self.addresses: list[str] = []

    def set_runner_ray(self, address: str | None, noop_if_initialized: bool) -> None:
        self.runner = self.runner or "ray"  # no error where Daft runs natively

    def set_runner_native(self) -> None:
        if self.runner:
            raise ValueError("DaftError::InternalError Cannot set runner more than once")
        self.runner = "native"

    def get_or_infer_runner_type(self) -> str:
        return self.runner

    def is_initialized(self) -> bool:
        return self.initialised

    def init(self, address: str, **options: Any) -> None:
        self.addresses.append(address)
        if self.refuses:
            raise self.refuses
        self.initialised = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 6.0}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Stub], Stub]]:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    connect_ray.cache_clear()

    def install(stub: Stub) -> Stub:
        for name in ("daft", "ray"):
            monkeypatch.setitem(sys.modules, name, stub)
        return stub

    yield install
    connect_ray.cache_clear()


@pytest.mark.parametrize("error", [ConnectionError("timeout"), ValueError("no address"), RuntimeError("twice")])
def test_a_cluster_that_cannot_be_joined_is_told_whatever_daft_runs_on(
    installed: Callable[[Stub], Stub], error: Exception
) -> None:
    installed(Stub("ray", refuses=error))
    with pytest.raises(InputError, match=rf"stage\.ray=ray://h:1: cannot be joined \({error}\)"):
        DaftRunner(True, None, "ray://h:1")


def test_a_process_has_one_cluster(installed: Callable[[Stub], Stub]) -> None:
    stub = installed(Stub())
    assert (DaftRunner(True, None, "auto").workers, DaftRunner(True, 3, "auto").workers) == (6, 3)
    assert stub.addresses == ["auto"]
    with pytest.raises(InputError, match=r"stage\.ray=ray://h:1: this process has joined another Ray cluster already"):
        DaftRunner(True, None, "ray://h:1")
    with pytest.raises(InputError, match=r"stage\.ray=\(this machine\): this process has joined another"):
        DaftRunner(True, None, None)


def test_a_process_has_one_engine_of_dafts(installed: Callable[[Stub], Stub]) -> None:
    installed(Stub())
    assert [DaftRunner(False, 2, None).workers, DaftRunner(False, 4, None).workers] == [2, 4]
    with pytest.raises(InputError, match=r"stage\.engine=ray: this process uses Daft's other engine already"):
        DaftRunner(True, 2, None)
    installed(Stub("ray"))
    with pytest.raises(InputError, match=r"stage\.engine=daft: this process uses Daft's other engine already"):
        DaftRunner(False, 2, None)


def test_without_daft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so, and telemetry is disabled in the environment before Daft is imported."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "daft", None)
    with pytest.raises(InputError, match=r"stage\.engine=daft: is not installed here .*docs/data\.md"):
        DaftRunner(False, None, None)
    assert NO_TELEMETRY.items() <= os.environ.items()
    assert {"DO_NOT_TRACK", "RAY_USAGE_STATS_ENABLED"} <= NO_TELEMETRY.keys()
