"""Runs a program that nobody read, with limits. Limits are no sandbox: they stop accidents, and not somebody who looks
for a way out of a process or past the kernel. What must not be lost does not belong on the machine."""

from __future__ import annotations

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROCESSES, FILE_MB, PROBE_S = 64, 16, 20
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/alternatives", "/etc/ld.so.cache")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that the program sees of the environment, and HOME: numerical libraries reserve memory for each thread."""
READ_BYTES = 2**18
"""Of what the process reports; the rest is not read."""

# Run by `python -I`: reads a job, limits itself, runs the program and then each test in one namespace, and writes a
# line for each: its number (-1 is the program) and what went wrong. The output of the program goes nowhere. The
# lines begin with a secret, so that a program that ends the process early has not passed.
DRIVER = """
import json, os, resource, sys, types
def main():
    job = json.load(sys.stdin)
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    report, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    module = sys.modules["answer"] = types.ModuleType("answer")
    for number, source in enumerate([job["program"], *job["tests"]], -1):
        problem = ""
        try:
            exec(compile(source, "answer.py" if number < 0 else "test.py", "exec"), module.__dict__)
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"[:300]
        os.write(report, (job["secret"] + json.dumps([number, problem]) + "\\n").encode())
        if number < 0 and problem:
            break
    os._exit(0)
main()
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one run may take.

    Attributes:
        seconds: of wall time, and rounded up of each process's processor time.
        memory_mb: address space of each process.
    """

    seconds: float = 10.0
    memory_mb: int = 1024


class Ran(NamedTuple):
    """What became of a program and its tests.

    Attributes:
        problems: what went wrong in each test; empty where it passed, None where it was not reached.
        ended: why some were not reached; empty where all were.
    """

    problems: list[str | None]
    ended: str


def run_tests(program: str, tests: Sequence[str], limits: Limits) -> Ran:
    """Run a program, and then each test in its namespace.

    The process has a new folder or file system, and no environment. Where the machine can do so (`isolation`), it has
    no network, and none of its children outlives it; elsewhere a child that makes a session of its own does.
    """
    token = secrets.token_hex(16)
    job = {"program": program, "tests": list(tests), "limits": resource_limits(limits), "secret": token}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as told:
        given.write(json.dumps(job).encode())
        given.seek(0)
        ended = finished([*isolation()[1], *python("-c", DRIVER)], folder, given, told, limits.seconds)
        told.seek(0)
        lines = told.read(READ_BYTES).decode("utf-8", "replace").split("\n")[:-1]  # of what was cut, whole lines
    found = dict(json.loads(line.removeprefix(token)) for line in lines if line.startswith(token))
    whole = len(found) == len(tests) + 1
    ended = ended or ("" if whole else "it ended the process")
    return Ran([found.get(i) for i in range(len(tests))], found.get(-1) or ended)


def finished(command: list[str], folder: str, given: object, told: object, seconds: float) -> str:
    """Run to the end or to the limit; how it ended, empty where by itself and well."""
    process = subprocess.Popen(
        command, stdin=given, stdout=told, stderr=subprocess.DEVNULL, cwd=folder, start_new_session=True,  # type: ignore[arg-type]
        env=ENVIRONMENT | {"HOME": folder},
    )  # fmt: skip
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"it took more than {seconds:g} s"
    finally:
        with suppress(ProcessLookupError):  # also when it ended by itself: its children may be alive
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"it ended with status {status}" if status else ""


def resource_limits(limits: Limits) -> dict[str, int]:
    """By the names of Python's `resource`."""
    return {
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory_mb * 2**20,
        "RLIMIT_FSIZE": FILE_MB * 2**20,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-I", *arguments]


@functools.cache
def isolation() -> tuple[str, tuple[str, ...]]:
    """What keeps the network and other processes away: its name, and the beginning of the command. Both are empty
    where the machine has neither bubblewrap nor user namespaces."""
    for name, command in (("bubblewrap", bubblewrap()), ("unshare", unshare())):
        if shutil.which(command[0]) and works(command):
            return name, tuple(command)
    return "", ()


def works(command: Sequence[str]) -> bool:
    """Whether a Python starts behind it and finds no network but its own."""
    alone = "import socket, sys; sys.exit(any(name != 'lo' for _, name in socket.if_nameindex()))"
    with suppress(OSError, subprocess.TimeoutExpired):
        return not subprocess.run([*command, *python("-c", alone)], capture_output=True, timeout=PROBE_S).returncode
    return False


def bubblewrap() -> list[str]:
    """Sees the system's libraries and this Python, read-only, and an empty folder in memory: no home, no data."""
    seen = [*SYSTEM, *dict.fromkeys([sys.base_prefix, sys.prefix, str(Path(sys.executable).resolve().parent.parent)])]
    shown = [word for path in seen for word in ("--ro-bind-try", path, path)]
    return [
        "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--dev", "/dev", "--proc",
        "/proc", "--size", str(4 * FILE_MB * 2**20), "--tmpfs", "/tmp", *shown, "--chdir", "/tmp",
        "--setenv", "HOME", "/tmp",
    ]  # fmt: skip


def unshare() -> list[str]:
    """No network and no other processes, but every file that this user may read."""
    return ["unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child"]
