"""Commands in separate processes that need not import torch again: a server has imported it, and forks.

Tests of the order of imports, of the path and of how soon `--help` answers need a fresh interpreter. Tests of signals,
of limits and of the files that a process leaves behind use these forks, which start five seconds sooner.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 600.0
"""Deadline that only a fault reaches, even on a busy machine."""


class FinishedCommand(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def folder(self) -> str:
        """The last line of the output."""
        return self.out.splitlines()[-1]


class Child:
    """A running `python -m align`.

    Attributes:
        pid: the command's process id.
    """

    def __init__(self, pid: int, connection: socket.socket, out: IO[str], err: IO[str]) -> None:
        self.pid = pid
        self._connection = connection
        self._out = out
        self._err = err
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status as `subprocess` counts it, or None while the command runs."""
        if self._status is None:
            self._connection.settimeout(0.001)
            try:
                self._status = int(self._connection.recv(100))
            except TimeoutError:
                return None
        return self._status

    @property
    def printed(self) -> str:
        """Standard output so far."""
        return os.pread(self._out.fileno(), 1 << 20, 0).decode()

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def wait(self, timeout_s: float = DEADLINE_S) -> FinishedCommand:
        """Wait for the end of the command. Its output goes to files, so that it need not be read while it runs.

        Raises:
            TimeoutError: the command did not end in time; it is killed.
        """
        if self._status is None:
            self._connection.settimeout(timeout_s)
            try:
                self._status = int(self._connection.recv(100))
            except TimeoutError:
                self.send_signal(signal.SIGKILL)
                raise
        for file in (self._out, self._err):
            file.seek(0)
        return FinishedCommand(self._status, self._out.read(), self._err.read())


def wait_for_checkpoint(child: Child, folder: Path) -> None:
    """Wait until the run `sft/x` below this folder has sealed its first checkpoint."""
    began = time.monotonic()
    while not list(folder.glob("runs/sft/x/checkpoints/*/align_seal.json")):
        assert child.poll() is None, child.wait()
        assert time.monotonic() - began < DEADLINE_S, "no checkpoint"
        time.sleep(0.02)


class Forks:
    """A client of the server that forks commands.

    Args:
        address: path of the server's socket.
    """

    def __init__(self, address: Path) -> None:
        self.address = address

    def start(
        self,
        cwd: Path,
        *words: str,
        stdin: str = "",
        file_size: int | None = None,
        before: str = "",
        script: Path | None = None,
    ) -> Child:
        """Start `python -m align WORDS` as the leader of a new session, as a terminal does.

        Args:
            file_size: the kernel's limit on the size of files that it writes, in bytes.
            before: Python code that it runs first.
            script: start `python SCRIPT WORDS` instead of `python -m align WORDS`.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(120)
        connection.connect(str(self.address))
        stdin_file, out, err = (TemporaryFile("w+", encoding="utf-8") for _ in range(3))  # noqa: SIM115
        stdin_file.write(stdin)
        stdin_file.flush()
        stdin_file.seek(0)
        request = {"cwd": str(cwd), "words": words, "file_size": file_size, "before": before}
        request |= {"script": script and str(script)}
        socket.send_fds(connection, [json.dumps(request).encode()], [file.fileno() for file in (stdin_file, out, err)])
        stdin_file.close()
        return Child(int(connection.recv(100)), connection, out, err)

    def run(self, cwd: Path, *words: str, **more: Any) -> FinishedCommand:
        return self.start(cwd, *words, **more).wait()


@contextmanager
def run_fork_server() -> Iterator[Forks]:
    """Run a server that forks commands while the block runs."""
    with ExitStack() as stack:
        address = Path(stack.enter_context(TemporaryDirectory(prefix="align-forks-")), "socket")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, str(address)]
        server = stack.enter_context(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        stack.callback(server.kill)
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield Forks(address)


# In the server

USED = (
    "align.report.live",
    "align.report.stages",
    "align.serve.app",
    "align.trainers.sft",
    "matplotlib.figure",
    "peft.utils.transformers_weight_conversion",
    "torch.utils.serialization",
    "transformers.integrations.bitsandbytes",
    "transformers.models.llama.modeling_llama",
)
"""Modules that commands import in addition to their stage's imports."""


def accept_requests(address: str) -> None:
    """Fork a keeper process for each connection, which forks the command and waits for it."""
    import align.report.plots
    from align.config.compose import build_config, compose_tree
    from align.config.stages import STAGES
    from align.stages import preload

    for name in (*(f"align.stages.{stage.module}" for stage in STAGES.values()), *USED):
        importlib.import_module(name)
    preload(STAGES)
    build_config(compose_tree(["stage=sft"]))
    # Rendering a plot takes half a second.
    align.report.plots.render_figure = lambda *_, **__: b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the server does not wait for keepers
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> None:
    """Run a command: send its process id, then its exit status. Returns only in the command's process."""
    message, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    if (child := os.fork()) == 0:
        connection.close()
        return become(json.loads(message), files)
    connection.sendall(str(child).encode())
    for file in files:
        os.close(file)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: Mapping[str, Any], files: Sequence[int]) -> None:
    """Run `python -m align` or a script in this process, which has imported torch."""
    os.setsid()
    for i, file in enumerate(files):
        os.dup2(file, i)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.chdir(request["cwd"])
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    script = request["script"]
    sys.path[0] = str(Path(script).parent) if script else request["cwd"]
    sys.argv = [script or "align", *request["words"]]
    exec(request["before"], {})
    if script:
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module("align", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    accept_requests(sys.argv[1])
