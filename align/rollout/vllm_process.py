"""vLLM's server as a process beside us, at a socket that nobody but its owner reaches."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from align.core.errors import InputError
from align.rollout.engine_process import last_words
from align.rollout.vllm_client import VllmClient

# It ends with us, also where we are killed: whatever memory it holds is of no use to anybody else. A child of its own
# waits until the pipe to us is closed. (PR_SET_PDEATHSIG tells of the end of the thread that started it, and a sampler
# that works ahead starts servers from threads that end.)
GUARD = """
import os, shutil, signal, sys, time
room, server, words = sys.argv[1], os.getpid(), sys.argv[2:]
if os.fork():
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execv(sys.executable, [sys.executable, "-I", "-m", "vllm.entrypoints.cli.main", *words])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.read(0, 1)
os.killpg(0, signal.SIGTERM)
until = time.monotonic() + 10
while os.getppid() == server and time.monotonic() < until:
    time.sleep(0.05)
shutil.rmtree(room, ignore_errors=True)
os.killpg(0, signal.SIGKILL)
"""
ROOM, NEW_S = "align-vllm-", 60
"""How the names of the sockets' folders begin; and for how many seconds one counts as new."""
LONGEST = 70
"""Characters of the temporary folder's path: a socket's has 107 bytes at most."""
NO_CAUSE = "See root cause above"
"""In a line of vLLM's that says that there is another."""
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


class VllmProcess:
    """`vllm serve`, from its start to its end.

    Args:
        python: that has vLLM.
        model: the folder of the base.
        words: further arguments.
        log: where what it says is added.
        group: of the settings that it is started by, for errors to name.
    """

    def __init__(self, python: str, model: Path, words: Sequence[str], log: Path, group: str = "serve") -> None:
        above = Path("/tmp" if len(tempfile.gettempdir()) > LONGEST else tempfile.gettempdir())
        remove_abandoned(above)
        self._room = tempfile.TemporaryDirectory(prefix=ROOM, dir=above)  # its owner's alone, as they are made
        self._held = locked(Path(self._room.name))
        self.socket, self.log, self.python = Path(self._room.name, "socket"), log, python
        self.group = group
        self._said_before = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [python, "-I", "-c", GUARD, self._room.name, "serve", str(model), "--uds", str(self.socket), *words],
                stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
                env=environment(os.environ, self._room.name),
                start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self, within_s: float) -> None:
        """Raises: InputError: it ended, or was not ready in time; with its last words."""
        until = time.monotonic() + within_s
        with closing(VllmClient(self.socket)) as client:
            while self.alive and time.monotonic() < until:
                if self.socket.exists() and client.up():
                    return
                time.sleep(0.1)
        how = f"was not ready within {within_s:g} seconds" if self.alive else "ended while it started"
        with self.log.open("rb") as said:
            said.seek(self._said_before)
            lines = said.read().decode(errors="replace").splitlines()
        words = last_words("\n".join(line for line in lines if NO_CAUSE not in line))
        self.stop(0)
        remedy = f"Read {self.log}, and correct {self.group}.args, or give it more time by {self.group}.start_s."
        raise InputError(f"{self.group}.python", self.python, f"vLLM {how} ({words})", remedy)

    def stop(self, within_s: float) -> None:
        """End it, and whatever it has started. May be called again."""
        if self.alive:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(within_s)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._room.cleanup()
        if self._held is not None:
            os.close(self._held)
            self._held = None


def locked(folder: Path) -> int | None:
    """A descriptor that holds a folder's lock until it is closed, or its process ends; None where another has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def remove_abandoned(above: Path) -> None:
    """Remove the folders of servers whose owner was killed together with the child that removes them.

    What is new may be about to be locked by its owner; what holds anything but sockets is none of ours; what cannot be
    opened is another user's.
    """
    for folder in above.glob(f"{ROOM}*"):
        with suppress(OSError):
            descriptor = locked(folder) if time.time() - folder.lstat().st_mtime > NEW_S else None
            if descriptor is None:
                continue
            try:
                sockets = [*folder.iterdir()]
                if all(each.is_socket() for each in sockets):
                    for each in sockets:
                        each.unlink()
                    folder.rmdir()
            finally:
                os.close(descriptor)


def environment(given: Mapping[str, str], sockets: str) -> dict[str, str]:
    """That of the process: without what would make another Python of it, or tell it a key to ask for.

    Args:
        sockets: the folder for those of its own.
    """
    left_out = ("PYTHONPATH", "PYTHONHOME", "VLLM_API_KEY")
    kept = {name: value for name, value in given.items() if name not in left_out}
    return {**kept, **ENVIRONMENT, "VLLM_RPC_BASE_PATH": sockets}


def serve_words(
    base: str, dtype: str, *, modules: Sequence[str], rank: int, adapters: int, slots: int, context: int,
    prefixes: bool, logprobs: str = "raw_logprobs",
) -> list[str]:  # fmt: skip
    """Arguments of `vllm serve` for adapters on a base.

    Args:
        base: its digest, part of the name that it is served by.
        modules: names of the layers that adapters may be on. The head is none of them: vLLM 0.32 ends where one request
            has logprobs of its prompt and another an answer, if it makes room for adapters on the head.
        rank: the highest of an adapter.
        adapters: that one batch may have.
        slots: requests that are answered at once.
        context: tokens of a prompt and its answer.
        prefixes: of earlier prompts are kept.
        logprobs: `raw_logprobs`, the model's own, or `processed_logprobs`, at the temperature of the request.
    """
    return [
        "--served-model-name", base_name(base), "--dtype", dtype, "--enable-lora", "--max-lora-rank", str(rank),
        "--max-loras", str(adapters), "--max-num-seqs", str(slots), "--generation-config", "vllm",
        "--structured-outputs-config", '{"backend": "guidance"}', "--disable-uvicorn-access-log",
        "--enable-prefix-caching" if prefixes else "--no-enable-prefix-caching", "--max-model-len", str(context),
        "--logprobs-mode", logprobs, "--lora-target-modules", *modules,
    ]  # fmt: skip


def base_name(digest: str) -> str:
    return f"base-{digest}"


def adapter_name(digest: str) -> str:
    return f"adapter-{digest}"
