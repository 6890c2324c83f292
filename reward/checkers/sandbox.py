"""Run a program that a model wrote, and its tests, under the strictest of the sandboxes that this machine has.

The program and the tests are two processes (`run_answer`, `run_tests`), each in a sandbox of its own, which exchange
values over two pipes (`remote_calls`). What each sandbox keeps away is in `docs/checkers.md`.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.reward.checkers import confinement, remote_calls, run_answer, run_tests

PROCESSES = 64
FILE_MB = 16
PROBE_S = 20
SCRATCH_BYTES = 4 * FILE_MB * 2**20
"""Maximum bytes of the files that one program can have in memory at once."""
LEAST_MB = 256
"""Minimum address space, in MiB, of the process that runs the tests."""
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/alternatives", "/etc/ld.so.cache")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""The program's environment variables, besides HOME: numerical libraries reserve memory for each thread."""
READ_BYTES = 2**18
"""Maximum bytes that are read of the report by the tests' process."""
TIERS = ("bubblewrap", "namespaces", "landlock")
"""The kinds of sandboxes, from the strictest to the loosest."""
UNSAFE = "unsafe"

# Run by `python -I -c`: the modules that the process needs come as text, for its sandbox may not show their files.
START = """
import json, sys, types
modules, settings = json.loads(sys.argv.pop()), json.loads(sys.argv.pop())
package = "align.reward.checkers"
sys.modules[package] = types.ModuleType(package)
for name, source in modules.items():
    module = sys.modules[package + "." + name] = types.ModuleType(package + "." + name)
    exec(compile(source, name + ".py", "exec"), module.__dict__)
module.main(settings)
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of time and memory of one run of a program with its tests.

    Attributes:
        seconds: of wall time, and rounded up of each process's processor time.
        memory_mb: address space of each process.
    """

    seconds: float = 10.0
    memory_mb: int = 1024


class Tier(NamedTuple):
    """A kind of sandbox, and the user that it runs programs as.

    Attributes:
        name: one of `TIERS`, or `unsafe`.
        drops_root: whether the program runs as the user 65534 although this process is root.
    """

    name: str
    drops_root: bool = False


class ProgramRun(NamedTuple):
    """The outcome of running a program with its tests: the problem of each test.

    Attributes:
        problems: the problem of each test: empty if it passed, None if it was not reached.
        ended: why some tests were not reached; empty if all were.
        tier: the name of the sandbox.
    """

    problems: list[str | None]
    ended: str
    tier: str


class SandboxFailed(RuntimeError):
    """The error for a sandbox that could not be set up. This says nothing about the program."""


def run_program(program: str, tests: Sequence[str], limits: Limits, tier: Tier) -> ProgramRun:
    """Run a program and its tests in two sandboxed processes, and return the problem of each test.

    Raises:
        SandboxFailed: a process could not be confined, so that nothing was run.
    """
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)) for _ in range(2)]
        job_file, report = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        with ExitStack() as processes:
            with ExitStack() as pipes:
                from_answer = open_pipe(pipes)
                to_answer = open_pipe(pipes)
                tester_ends = (from_answer.read_end, to_answer.write_end)
                job = {"program": program, "tests": list(tests), "descriptors": tester_ends}
                job_file.write(json.dumps(job).encode())
                job_file.seek(0)
                at_least = Limits(limits.seconds, max(limits.memory_mb, LEAST_MB))
                answerer = start_confined_process(
                    "run_answer", tier, limits, folders[1], to_answer.read_end, from_answer.write_end
                )
                processes.callback(kill_session, answerer)
                tester = start_confined_process("run_tests", tier, at_least, folders[0], job_file, report, tester_ends)
                processes.callback(kill_session, tester)  # killed first: it reports the end of the other
            exit_reason = wait_and_describe_exit(tester, limits.seconds)
        report.seek(0)
        lines = report.read(READ_BYTES).decode("utf-8", "replace").split("\n")[:-1]  # without an incomplete last line
    problems: dict[int, str] = dict(json.loads(line) for line in lines)
    if run_tests.NOT_STARTED in problems or (not problems and exit_reason and "status" in exit_reason):
        raise SandboxFailed(f"the sandbox ({tier.name}) could not be set up")
    results = [problems.get(number) for number in range(len(tests))]
    reason = problems.get(run_tests.PROGRAM) or problems.get(run_tests.ENDED) or exit_reason
    if not reason and None in results:
        reason = "the tests ended their process"
    return ProgramRun(results, reason, tier.name)


class Pipe(NamedTuple):
    """The file descriptors of a pipe's two ends."""

    read_end: int
    write_end: int


def open_pipe(stack: ExitStack) -> Pipe:
    """Open a pipe, and register both of its ends with an ExitStack, which closes them."""
    pipe = Pipe(*os.pipe())
    stack.callback(os.close, pipe.read_end)
    stack.callback(os.close, pipe.write_end)
    return pipe


def start_confined_process(
    role: str,
    tier: Tier,
    limits: Limits,
    folder: str,
    standard_input: Any,
    standard_output: Any,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a Python process that confines itself to a sandbox and runs `main` of the module `role`.

    Args:
        role: the module, `run_answer` or `run_tests`.
        folder: its working directory.
        descriptors: further file descriptors that it inherits.
    """
    settings = {
        "tier": tier.name,
        "drop": tier.drops_root,
        "visible": list_visible_paths(),
        "scratch_bytes": SCRATCH_BYTES,
        "limits": build_resource_limits(limits, tier),
    }
    arguments = ["-I", "-c", START, json.dumps(settings), json.dumps(read_module_sources(role))]
    command = [
        *(build_bubblewrap_command(tier.drops_root) if tier.name == "bubblewrap" else ()),
        get_interpreter(),
        *arguments,
    ]
    return subprocess.Popen(
        command,
        stdin=standard_input,
        stdout=standard_output,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,
        pass_fds=descriptors,
        env=ENVIRONMENT | {"HOME": confinement.SCRATCH if tier.name in ("bubblewrap", "namespaces") else folder},
    )


@functools.cache
def read_module_sources(role: str) -> Mapping[str, str]:
    """Return the source code of the modules that a sandboxed process needs: module name → source, the main one last.

    Args:
        role: the main module, `run_answer` or `run_tests`.
    """
    main = {"run_answer": run_answer, "run_tests": run_tests}[role]
    return {
        module.__name__.rpartition(".")[2]: inspect.getsource(module) for module in (confinement, remote_calls, main)
    }


def wait_and_describe_exit(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for the tests' process, and return a text with its status or the timeout; empty if its status is 0.

    A process that takes longer than `seconds` is left running.
    """
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"it took more than {seconds:g} s"
    return f"its tests ended with status {status}" if status else ""


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes in a process's session, and wait for it. Its children may be alive although it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def build_resource_limits(limits: Limits, tier: Tier) -> dict[str, int]:
    """Return the resource limits of a sandboxed process, such as `RLIMIT_AS`: name in Python's `resource` → value.

    Processes are counted by user. A sandbox with a user namespace has a count of its own; elsewhere what the user runs
    besides is added.
    """
    has_own_count = tier.name == "namespaces" or (tier.name == "bubblewrap" and not tier.drops_root)
    running = 0 if has_own_count else count_threads(tier.drops_root)
    return {
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_AS": limits.memory_mb * 2**20,
        "RLIMIT_FSIZE": FILE_MB * 2**20,
        "RLIMIT_NPROC": PROCESSES + running,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


def count_threads(drops_root: bool) -> int:
    """Return the number of threads that run on this machine as the user that the program will run as.

    Args:
        drops_root: whether the program runs as the user 65534 although this process is root.
    """
    uid = confinement.NOBODY if drops_root else os.geteuid()
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.stat().st_uid == uid:
                count += sum(1 for _ in (folder / "task").iterdir())
    return count


def get_interpreter() -> str:
    """Return the path of the Python interpreter that runs the programs, this process's own."""
    return sys.executable


@functools.cache
def list_visible_paths() -> list[str]:
    """Return the paths that a program may read: the system's libraries, and the running Python with its packages.

    The rest of the folder that Python is installed in may be a home.
    """
    executables = {get_interpreter(), os.path.realpath(get_interpreter())}
    prefixes = [sys.prefix, sys.base_prefix, sys.base_exec_prefix]
    parts = [os.path.join(prefix, part) for prefix in prefixes for part in ("bin", "lib", "lib64", "pyvenv.cfg")]
    packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
    folders = [*parts, *packages, *(os.path.dirname(each) for each in executables)]
    return [*SYSTEM, *dict.fromkeys(path for path in folders if not path.startswith("/usr/") and os.path.exists(path))]


def build_bubblewrap_command(drops_root: bool) -> list[str]:
    """Return the `bwrap` arguments that precede a program's command to run it in a bubblewrap sandbox.

    To become the user 65534, root keeps the rights to do so, and needs no user namespace.
    """
    parents = {str(parent) for path in list_visible_paths() if path not in SYSTEM for parent in Path(path).parents}
    folders = [word for path in sorted(parents - {"/"}) for word in ("--perms", "0755", "--dir", path)]
    binds = [word for path in list_visible_paths() for word in ("--ro-bind-try", path, path)]
    rights = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if drops_root else ()
    spaces = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
    return [
        "bwrap",
        *(spaces if drops_root else ("--unshare-all",)),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *rights,
        *("--dev", "/dev", "--proc", "/proc", "--size", str(SCRATCH_BYTES), "--tmpfs", confinement.SCRATCH),
        *folders,
        *binds,
        *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", confinement.SCRATCH),
    ]


def list_tier_variants(name: str) -> list[Tier]:
    """Return the sandboxes of a kind to try, in order: for root, as the user 65534 first and then as root.

    As the user 65534 the program's number of processes is limited. That fails if this user cannot read this Python and
    the sandbox has no view of files of its own.
    """
    return [Tier(name, True), Tier(name)] if os.geteuid() == 0 else [Tier(name)]


@functools.cache
def find_working_tier(names: tuple[str, ...] = TIERS) -> Tier | None:
    """Return the first of the named kinds of sandbox that works when it is tried on this machine, or None."""
    return next((tier for name in names for tier in list_tier_variants(name) if try_tier(tier)), None)


def choose_tier(allow_unsafe: bool, field: str) -> Tier:
    """Return the strictest sandbox that works on this machine, or raise InputError if none exists.

    If no sandbox works and `allow_unsafe` is True, the result is the kind `unsafe`, which has none.

    Args:
        allow_unsafe: whether the user agreed to run programs without any.
        field: the setting that the user agrees by.

    Raises:
        InputError: no sandbox works, and the user did not agree to run without one.
    """
    tier = find_working_tier() or (find_working_tier((UNSAFE,)) if allow_unsafe else None)
    if tier is None:
        problem = "this machine cannot confine programs: bubblewrap, user namespaces and Landlock do not work here"
        remedy = (
            "Install bubblewrap, or allow user namespaces or Landlock (Linux 5.13). On a machine that holds nothing "
            f"valuable, write {field}=true to run without a sandbox."
        )
        raise InputError(field, False, problem, remedy)
    return tier


PROBE = """
import colorsys, os  # a module that this process has not read yet
def open_doors():
    doors = []
    for path in PATHS:
        try:
            os.listdir(path)
            doors.append(path)
        except OSError:
            pass
    try:
        import socket
        with socket.socket() as mine:
            doors += [name for _, name in socket.if_nameindex() if name != "lo"]
    except OSError:
        pass
    return doors
"""


def try_tier(tier: Tier) -> bool:
    """Return whether a test program runs in a sandbox, and can see neither home folders nor a network there.

    Without a sandbox (`unsafe`) it only has to run.
    """
    if tier.name == "bubblewrap" and not shutil.which("bwrap"):
        return False
    test = "assert open_doors is not None" if tier.name == UNSAFE else "assert open_doors() == []"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        # A home that holds this Python has to be visible; it shows nothing else.
        homes = [path for path in ("/root", "/home") if not any(each.startswith(path) for each in list_visible_paths())]
        program = f"PATHS = {[folder, *homes]!r}\n{PROBE}"
        try:
            return run_program(program, [test], Limits(PROBE_S), tier).problems == [""]
        except (SandboxFailed, OSError):
            return False
