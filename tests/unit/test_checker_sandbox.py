"""Each sandbox for programs, as root and as the user 65534, against a program that attacks it. The program really
runs; the same attacks are shown to work without a sandbox."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import InputError
from align.reward.checkers import build_checker, confinement, sandbox
from align.reward.checkers.sandbox import TIERS, UNSAFE, Limits, ProgramRun, Tier, run_program

NOBODY = confinement.NOBODY
SECRET = "hunter2"

ATTACKS = """
import ctypes, os, resource, signal, socket, subprocess, sys, time

libc = ctypes.CDLL(None, use_errno=True)

def tried(*actions):
    "Return the results of the actions that did not fail."
    results = []
    for action in actions:
        try:
            results.append(action())
        except Exception:
            pass
    return results

def write_outside(folder):
    def create():
        open(folder + "/new", "w").write("x")
    def replace():
        open(folder + "/secret", "w").write("x")
    def link():
        os.symlink("/", folder + "/link")
    def cut():
        os.truncate(folder + "/secret", 0)
    def cut_on_opening():
        os.open(folder + "/secret", os.O_RDONLY | os.O_TRUNC)
    def remove():
        os.unlink(folder + "/secret")
    def change_mode():
        os.chmod(folder + "/secret", 0)
    def change_time():
        os.utime(folder + "/secret", (1, 1))
    def program():
        subprocess.run(["/bin/sh", "-c", "echo x > " + folder + "/shell"])
    tried(create, replace, link, cut, cut_on_opening, change_mode, change_time, program, remove)

def read_files(folder, pid):
    def read():
        return open(folder + "/secret").read()
    def names():
        return str(os.listdir(folder))
    def environment():
        return open(f"/proc/{pid}/environ").read()
    def root():
        return open(f"/proc/{pid}/root{folder}/secret").read()
    def shadow():
        return open("/etc/passwd").read()
    return tried(read, names, environment, root, shadow)

def remount(folder):
    flags = 32 | 4096  # remount, bind: writable
    def again():
        return libc.mount(None, b"/usr", None, ctypes.c_ulong(flags), None)
    def new():
        return libc.mount(b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(0), None)
    def away():
        return libc.umount2(b"/usr", 2)
    def root():
        return libc.umount2(b"/", 2)
    def spaces():
        return libc.unshare(0x10000000 | 0x20000)
    def cloned():
        return 0 if libc.syscall({"x86_64": 56}.get(os.uname().machine, 220), 0x10000000 | 17, 0, 0, 0, 0) > 0 else -1
    return [call.__name__ for call in (again, new, away, root, spaces, cloned) if call() == 0]

def connect(port, name):
    def tcp():
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
        return "tcp"
    def abstract():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("\\0" + name)
        return "abstract"
    def ring():
        buffer = ctypes.create_string_buffer(120)
        if libc.syscall(425, 1, buffer) < 0:
            raise OSError
        return "io_uring"
    return tried(tcp, abstract, ring)

def harm_process(pid):
    def kill():
        os.kill(pid, signal.SIGTERM)
        return "kill"
    def trace():
        if libc.ptrace(16, pid, 0, 0) != 0:
            raise OSError
        return "ptrace"
    def limit():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (1, 1))
        return "prlimit"
    def signal_by_descriptor():
        import fcntl
        reading, writing = os.pipe()
        fcntl.fcntl(reading, 8, pid)
        fcntl.fcntl(reading, 10, signal.SIGTERM)
        fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
        if fcntl.fcntl(reading, 9) != pid:
            raise OSError
        os.write(writing, b"x")
        return "owner"
    def niceness():
        os.setpriority(os.PRIO_PROCESS, pid, 15)
        return "priority"
    return tried(limit, niceness, signal_by_descriptor, kill, trace)

def fork_many():
    children, refused = [], False
    for _ in range(150):
        try:
            child = os.fork()
        except OSError:
            refused = True
            break
        if child == 0:
            time.sleep(30)
            os._exit(0)
        children.append(child)
    return refused

def leave_child(mark):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300) # " + mark], start_new_session=True)

def take_memory():
    return "a" * 2**33

def loop():
    while True:
        pass
"""


@dataclass
class Machine:
    """The targets of an attack: a folder that all users may write, servers, and a process of the same user."""

    uid: int
    folder: Path
    port: int
    name: str
    victim: subprocess.Popen[Any]

    def run(self, tier: str, *tests: str, seconds: float = 20.0) -> ProgramRun:
        return run_as_user(self.uid, lambda: run_program(ATTACKS, tests, Limits(seconds), find_working_tier(tier)))


def find_readable_python(uid: int) -> str:
    """Return a Python that a user may start."""
    for path in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        user = {} if uid == os.geteuid() else {"user": uid, "group": uid, "extra_groups": []}
        try:
            if not subprocess.run([path, "-I", "-c", "import fractions"], **user, capture_output=True).returncode:
                return path
        except OSError:
            continue
    pytest.skip("needs: a Python that nobody can read")


def run_as_user(uid: int, action: Callable[[], Any]) -> Any:
    """Return what an action returns in a child process of a user."""
    if uid == os.geteuid():
        return action()
    python = find_readable_python(uid)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            sandbox.get_interpreter = lambda: python
            sandbox.list_visible_paths.cache_clear()
            tempfile.tempdir = "/tmp"
            os.write(writing, json.dumps(["", *action()]).encode())
        except BaseException as error:
            os.write(writing, json.dumps([f"{type(error).__name__}: {error}"]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        error, *fields = json.load(file)
    os.waitpid(child, 0)
    if error:
        raise RuntimeError(error)
    return ProgramRun(*fields)


def find_working_tier(name: str) -> Tier:
    """Return the first way to set up a sandbox that works for this user."""
    *better, last = sandbox.list_tier_variants(name)
    return next((tier for tier in better if sandbox.find_working_tier((name,)) == tier), last)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    if request.param == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed (Debian's package `bubblewrap`)")
    return request.param


@pytest.fixture(params=[0, NOBODY], ids=["root", "nobody"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    uid = request.param
    if uid != os.geteuid() and os.geteuid() != 0:
        pytest.skip("needs: root")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        path = Path(folder)
        path.chmod(0o777)
        (path / "secret").write_text(SECRET)
        os.chown(path / "secret", uid, uid)
        (path / "secret").chmod(0o666)
        name = f"align_{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind("\0" + name)
            abstract.listen()
            user = {} if uid == os.geteuid() else {"user": uid, "group": uid, "extra_groups": []}
            victim = subprocess.Popen(["sleep", "60"], env={"SECRET": SECRET}, **user)
            try:
                yield Machine(uid, path, server.getsockname()[1], name, victim)
            finally:
                victim.kill()
                victim.wait()


def read_state(path: Path) -> tuple[str, int, float]:
    stat = path.stat()
    return path.read_text(), stat.st_mode, stat.st_mtime


def test_a_sandbox_keeps_an_attack_in(tier: str, machine: Machine):
    before = read_state(machine.folder / "secret")
    victim = machine.victim
    limits = Path(f"/proc/{victim.pid}/limits").read_text()
    niceness = os.getpriority(os.PRIO_PROCESS, victim.pid)
    result = machine.run(
        tier,
        f"write_outside({str(machine.folder)!r})",
        f"assert {SECRET!r} not in str(read_files({str(machine.folder)!r}, {victim.pid}))",
        f"assert 'secret' not in str(read_files({str(machine.folder)!r}, {victim.pid}))",
        "assert 'root:' not in str(read_files('/', 1))",
        f"found = remount({str(machine.folder)!r}); assert found == [], found",
        f"found = connect({machine.port}, {machine.name!r}); assert found == [], found",
        f"found = harm_process({victim.pid}); assert found == [], found",
        "try:\n    take_memory()\n    assert False\nexcept MemoryError:\n    pass",
    )
    assert result.problems == [""] * 8, result
    assert result.tier == tier
    assert [each.name for each in machine.folder.iterdir()] == ["secret"]
    assert read_state(machine.folder / "secret") == before
    assert victim.poll() is None
    assert os.getpriority(os.PRIO_PROCESS, victim.pid) == niceness
    assert Path(f"/proc/{victim.pid}/limits").read_text() == limits


def test_a_sandbox_ends_loops_and_children(tier: str, machine: Machine):
    mark = f"align_mark_{os.getpid()}_{tier}_{machine.uid}"
    limited = machine.uid != 0 or find_working_tier(tier).drops_root  # the kernel does not count root's
    result = machine.run(tier, f"assert fork_many() == {limited}", f"leave_child({mark!r})", "loop()", seconds=2.0)
    assert result.problems[0] == ""
    assert result.problems[2] is None
    assert result.ended == "it took more than 2 s"
    deadline = time.monotonic() + 60  # the kernel ends killed processes in its own time
    while is_alive(mark):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_a_sandbox_the_same_attacks_work(machine: Machine):
    """Each attack does harm if nothing is confined."""
    result = machine.run(
        UNSAFE,
        f"assert {SECRET!r} in str(read_files({str(machine.folder)!r}, {machine.victim.pid}))",
        f"assert connect({machine.port}, {machine.name!r})[:2] == ['tcp', 'abstract']",
        f"write_outside({str(machine.folder)!r})",
        f"assert {{'prlimit', 'priority', 'kill'}} <= set(harm_process({machine.victim.pid}))",
    )
    assert result.problems == [""] * 4, result
    assert {"new", "link", "shell"} <= {each.name for each in machine.folder.iterdir()}
    assert machine.victim.wait(10) != 0


def is_alive(mark: str) -> bool:
    """Return whether a process has a text in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_early_landlock_is_closed_by_the_filter(tmp_path: Path):
    """Before its third version, Landlock lets files be cut. The filter refuses the calls for that."""
    outside = tmp_path / "outside"
    outside.write_text("kept")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    if not (child := os.fork()):
        try:
            confinement.restrict_files(["/usr", "/lib"], str(scratch), version=1)
            confinement.install_seccomp_filter(without_namespaces=True)
            for cut in (lambda: os.truncate(outside, 0), lambda: os.open(outside, os.O_RDONLY | os.O_TRUNC)):
                try:
                    cut()
                    os._exit(1)
                except PermissionError:
                    pass
            os._exit(0)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert outside.read_text() == "kept"


def test_the_filter_knows_its_machines():
    assert len(confinement.build_seccomp_program("x86_64", True)) > len(
        confinement.build_seccomp_program("x86_64", False)
    )
    assert all(len(each) == 8 for each in confinement.build_seccomp_program("aarch64", True))
    with pytest.raises(OSError, match="riscv64"):
        confinement.build_seccomp_program("riscv64", True)


def test_a_machine_without_a_sandbox_refuses_unless_it_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "try_tier", lambda tier: tier.name == UNSAFE)
    sandbox.find_working_tier.cache_clear()
    try:
        spec = {"kind": "code", "tests": ["assert f(2) == 4"]}
        with pytest.raises(InputError, match=r"cannot confine programs.*unsafe_code=true"):
            build_checker(spec, "check", allow_code=True)
        allowed = build_checker(spec, "check", allow_code="unsafe")
        assert "without a sandbox" in allowed.warnings[0]
        assert allowed("def f(x): return 4").sandbox == UNSAFE
    finally:
        sandbox.find_working_tier.cache_clear()


def test_a_looser_sandbox_is_taken_where_a_stricter_one_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "try_tier", lambda tier: tier.name == "landlock")
    sandbox.find_working_tier.cache_clear()
    try:
        code_checker = build_checker({"kind": "code", "tests": ["assert f(2) == 4"]}, "check", allow_code=True)
        assert code_checker.sandbox == "landlock"
        assert "Landlock" in code_checker.warnings[0]
    finally:
        sandbox.find_working_tier.cache_clear()
