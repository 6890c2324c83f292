"""The vLLM server ends with the process that started it, even a killed one, and leaves no socket folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from vllm_stand_in import stand_in_python
from waiting import becomes_true

from align.rollout.vllm_server import (
    NEW_S,
    SOCKETS,
    VllmProcess,
    build_serve_arguments,
    remove_abandoned_folders,
    try_lock_folder,
)

OWNER = """
import sys, time
from pathlib import Path
from threading import Thread
from align.rollout.vllm_server import VllmProcess
held, (python, log, *words) = [], sys.argv[1:]
def begin():
    held.append(VllmProcess(python, Path("none"), words, Path(log)))
    while b"starts" not in Path(log).read_bytes():
        assert held[0]._process.poll() is None, Path(log).read_text()
        time.sleep(0.02)
start = Thread(target=begin)
start.start()
start.join()
print(held[0]._process.pid, held[0].socket.parent, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def list_group_members(group: int) -> list[int]:
    """Return ids of the running processes of a group."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    running_pids = []
    for pid in pids:
        with suppress(OSError):
            if os.getpgid(pid) == group and is_running(pid):
                running_pids.append(pid)
    return running_pids


@contextmanager
def kill_at_exit(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the process when the block ends, so that a failed test does not wait for it."""
    try:
        yield
    finally:
        process.kill()


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stand_in_python(tmp_path_factory.mktemp("venv"))


def test_it_ends_with_its_owner_and_not_with_the_thread_that_started_it(python: str, tmp_path: Path):
    log = tmp_path / "vllm.log"
    environment = {**os.environ, "STAND_IN": "never-ready", "TMPDIR": str(tmp_path)}
    serve_arguments = build_serve_arguments(
        "0" * 64, "float32", layers=["q_proj"], rank=8, adapters=1, slots=1, context=8, prefixes=False
    )
    command = [sys.executable, "-c", OWNER, python, str(log), *serve_arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner, kill_at_exit(owner):
        assert owner.stdout is not None
        pid, folder = owner.stdout.readline().split()
        assert becomes_true(lambda: b"starts" in log.read_bytes())
        time.sleep(0.2)  # PR_SET_PDEATHSIG would have ended it long ago
        assert is_running(int(pid))
        assert len(list_group_members(int(pid))) == 2
        owner.send_signal(signal.SIGKILL)
    assert becomes_true(lambda: not list_group_members(int(pid)))
    assert not Path(folder).exists()


def test_whoever_is_stopped_leaves_nothing(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STAND_IN", "never-ready")
    process = VllmProcess(python, Path("none"), [], tmp_path / "vllm.log")
    assert try_lock_folder(process.socket.parent) is None, "its owner holds it"
    process.stop(5)
    process.stop(5)
    assert not list_group_members(process._process.pid)
    assert not process.socket.parent.exists()


def test_abandoned_folders_are_removed_and_nothing_else(tmp_path: Path):
    def make_folder(name: str, age: float = 2 * NEW_S) -> Path:
        folder = tmp_path / f"{SOCKETS}{name}"
        folder.mkdir()
        return set_age(folder, age)

    def set_age(folder: Path, age: float = 2 * NEW_S) -> Path:
        modified = time.time() - age
        os.utime(folder, (modified, modified))
        return folder

    empty = make_folder("empty")
    new = make_folder("new", 1)
    owned = make_folder("owned")
    files = make_folder("files")
    (files / "mine").touch()
    (tmp_path / f"{SOCKETS}file").touch()
    (tmp_path / f"{SOCKETS}link").symlink_to(files)
    with tempfile.TemporaryDirectory(prefix=SOCKETS, dir="/tmp") as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short}/socket")
        sockets = Path(short).rename(tmp_path / f"{SOCKETS}sockets")
        Path(short).mkdir()  # TemporaryDirectory removes it
    lock = try_lock_folder(owned)
    for folder in (files, sockets):
        set_age(folder)
    remove_abandoned_folders(tmp_path)
    assert not empty.exists()
    assert not sockets.exists()
    assert new.exists()
    assert owned.exists()
    assert (files / "mine").exists()
    assert (tmp_path / f"{SOCKETS}link").is_symlink()
    assert lock is not None
    os.close(lock)
    remove_abandoned_folders(tmp_path)
    assert not owned.exists()
