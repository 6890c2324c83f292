"""A vLLM server, started here or running already: its process, its arguments, and the adapters that it is given."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from align.core.errors import InputError, require
from align.models.adapter_files import adaptable, adapter_config, check_targets, read_adapter
from align.models.load import skeleton
from align.models.lowering import check_plain
from align.rollout.engine_process import last_words, vllm_rank
from align.rollout.probes import NOT_BY_THIS, Logprobs, Probes, agreement, check_agreement, in_words
from align.rollout.vllm_client import KEY, LOCKED, VllmClient, VllmFailed
from align.run import Base

log = logging.getLogger(__name__)

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
SOCKETS = "align-vllm-"
"""How the names of the sockets' folders begin."""
NEW_S = 60
"""For how many seconds such a folder counts as new."""
LONGEST = 70
"""Characters of the temporary folder's path: a socket's has 107 bytes at most."""
STOPPING_S = 10.0
"""How long a server has to end."""
LOOK_S = 0.2
"""How often a server that does not answer yet is asked again."""
NO_CAUSE = "See root cause above"
"""In a line of vLLM's that says that there is another."""
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
LOWEST = 16
"""Room is made for adapters of this rank at least: they are the most common."""


class ServedAdapter(NamedTuple):
    """An adapter as vLLM is given it.

    Attributes:
        name: by which vLLM knows it. No other weights get this name, since vLLM keeps what it computed by a name.
        folder: plain LoRA; a copy of ours, so that nobody changes it while vLLM may read it.
        probes: what it must say.
    """

    name: str
    folder: Path
    probes: Probes


class VllmProcess:
    """`vllm serve`, from its start to its end, at a socket that only its owner reaches.

    Args:
        python: that has vLLM.
        model: the folder of the base.
        arguments: further ones.
        log: the file that its output is added to.
    """

    def __init__(self, python: str, model: Path, arguments: Sequence[str], log: Path) -> None:
        above = Path("/tmp" if len(tempfile.gettempdir()) > LONGEST else tempfile.gettempdir())
        remove_abandoned(above)
        self._folder = tempfile.TemporaryDirectory(prefix=SOCKETS, dir=above)  # its owner's alone, as they are made
        self._lock = lock_folder(Path(self._folder.name))
        self.socket = Path(self._folder.name, "socket")
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        command = ["serve", str(model), "--uds", str(self.socket), *arguments]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [python, "-I", "-c", GUARD, self._folder.name, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=process_environment(os.environ, self._folder.name),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """Return the line of its output that says best why it does not start."""
        with self.log.open("rb") as output:
            output.seek(self._log_start)
            lines = output.read().decode(errors="replace").splitlines()
        return last_words("\n".join(line for line in lines if NO_CAUSE not in line))

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
        self._folder.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class VllmServer:
    """A server that answers by a base and by adapters on it.

    Args:
        setting: the configuration key that names it, for errors.
        label: the value of that key, for errors; the URL of a server that runs already.
        start_s: seconds that it has to start, or to answer.
        remedy: what to do if it fails.
        start: starts its process; None for a server that runs already.

    Attributes:
        base: the name of the model that it was started with.
        loaded: the names of the adapters that it has.
    """

    process: VllmProcess | None = None
    client: VllmClient
    base: str

    def __init__(
        self, setting: str, label: str, start_s: float, remedy: str, start: Callable[[], VllmProcess] | None = None
    ) -> None:
        self.setting = setting
        self.label = label
        self.start_s = start_s
        self.remedy = remedy
        self._start = start
        self._closed = False
        self.loaded = set[str]()
        if start is None:
            self.client = VllmClient(label)

    def bring_up(self) -> None:
        """Start it, or wait until it answers; also again, after it was gone.

        Raises:
            InputError: it does not come up, or answers by names that it was never given.
        """
        self.loaded = set()
        self._base_logprobs: tuple[Sequence[Sequence[int]], Logprobs] = ((), ())
        require(not self._closed, self.setting, self.label, "is closed", "Run the same command again.")
        if self._start is not None:
            if self.process is not None:
                self.process.stop(STOPPING_S)
            self.process = self._start()
            self.client = VllmClient(self.process.socket)
        self._wait_until_up()
        try:
            self.base = self.client.base_name()
            self._refuse_unknown_names()
        except VllmFailed as error:
            raise self.explain(error, f"fails at its first question ({error})") from error

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.start_s
        is_announced = self.process is not None  # by whoever starts it
        while not self.client.is_up():
            has_ended = self.process is not None and not self.process.alive
            if has_ended or self._closed or time.monotonic() >= deadline:
                raise self._start_error(has_ended)
            if not is_announced:
                print(f"waiting for {self.label}, {self.start_s:g} seconds at most", flush=True)
                is_announced = True
            time.sleep(LOOK_S)

    def _start_error(self, has_ended: bool) -> InputError:
        if self.process is None:
            problem = f"does not answer within {self.start_s:g} seconds"
            return InputError(self.setting, self.label, problem, self.remedy)
        how = "ended while it started" if has_ended else f"was not ready within {self.start_s:g} seconds"
        problem = f"vLLM {how} ({self.process.last_words()})"
        self.process.stop(0)
        group = self.setting.partition(".")[0]
        remedy = f"Read {self.process.log}, and correct {group}.args, or give it more time by {group}.start_s."
        return InputError(self.setting, self.label, problem, remedy)

    def _refuse_unknown_names(self) -> None:
        is_known = self.client.knows(f"never-given-{secrets.token_hex(32)}")
        problem = "it answers by a name that it was never given, where a status 404 is due"
        require(not is_known, self.setting, self.label, problem, "Use another vLLM.")

    def load(self, adapter: ServedAdapter) -> None:
        """Load an adapter that is not loaded yet.

        Raises:
            VllmFailed
            InputError: vLLM then answers by names that it was never given.
        """
        if adapter.name in self.loaded:
            return
        if self.process is None:  # a server that was only slow for a moment still has it
            self.client.unload(adapter.name)
        self.client.load(adapter.name, adapter.folder)
        self.loaded.add(adapter.name)
        self._refuse_unknown_names()

    def unload(self, adapter: ServedAdapter) -> None:
        """Unload an adapter. One that stays takes memory, and nobody can ask for it."""
        try:
            self.client.unload(adapter.name)
        except VllmFailed as error:
            log.warning("%s stays in vLLM: %s", adapter.name, error)
        self.loaded.discard(adapter.name)

    def check(
        self, adapter: str | None, probes: Probes, dtype: str, field: str, value: str, remedy: str = NOT_BY_THIS
    ) -> None:
        """Check that an adapter is in force, or that the base is the one that it should be.

        Args:
            adapter: its name; None for the base.
            dtype: that the logprobs are as exact as.
            field, value, remedy: of the error.

        Raises:
            VllmFailed
            InputError: the server answers by something else than was trained.
        """
        if self._base_logprobs[0] != probes.rows:
            self._base_logprobs = probes.rows, self.client.logprobs(self.base, probes.rows)
        of_base = self._base_logprobs[1]
        agreed = agreement(self.client.logprobs(adapter, probes.rows) if adapter else of_base, of_base, probes)
        log.info("vLLM serves %s: %s", adapter or self.base, in_words(agreed))
        check_agreement(agreed, dtype, field, value, remedy)

    def explain(self, error: VllmFailed, problem: str, remedy: str = "") -> InputError:
        """Return an error about this server: the problem, or that the server asks for a key."""
        if error.status in LOCKED:
            has_key = bool(os.environ.get(KEY))
            problem = f"does not take the key in {KEY}" if has_key else f"asks for a key, and {KEY} is not set"
            problem = f"{problem} (status {error.status})"
            remedy = f"Set {KEY} in the environment to the key that the server was started with (--api-key)."
        return InputError(self.setting, self.label, problem, remedy or self.remedy)

    def close(self, within_s: float = STOPPING_S) -> None:
        """End it if it was started here. May be called again, and while other threads ask, whose next requests fail."""
        self._closed = True
        if self.process is not None:
            self.process.stop(within_s)
        if hasattr(self, "client"):
            self.client.closed = True


def lock_folder(folder: Path) -> int | None:
    """Return a descriptor that locks a folder until it is closed or its process ends; None if another has the lock."""
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
    for folder in above.glob(f"{SOCKETS}*"):
        with suppress(OSError):
            descriptor = lock_folder(folder) if time.time() - folder.lstat().st_mtime > NEW_S else None
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


def process_environment(variables: Mapping[str, str], sockets: str) -> dict[str, str]:
    """Return the environment of vLLM: without what would make another Python of it, or give it a key to ask for.

    Args:
        sockets: the folder for its own sockets.
    """
    left_out = ("PYTHONPATH", "PYTHONHOME", KEY)
    kept = {name: value for name, value in variables.items() if name not in left_out}
    return {**kept, **ENVIRONMENT, "VLLM_RPC_BASE_PATH": sockets}


def serve_arguments(
    base: str,
    dtype: str,
    *,
    layers: Collection[str],
    rank: int,
    adapters: int,
    slots: int,
    context: int,
    prefixes: bool,
    logprobs: str = "raw_logprobs",
) -> list[str]:
    """Return the arguments of `vllm serve` for adapters on a base.

    Args:
        base: its digest, part of the name that it is served by.
        layers: that adapters may be on; vLLM is given the last part of their names. The head is none of them: vLLM 0.32
            ends where one request has logprobs of its prompt and another an answer, if it makes room for adapters on
            the head.
        rank: the highest of an adapter.
        adapters: that one batch may have.
        slots: requests that are answered at once.
        context: tokens of a prompt and its answer.
        prefixes: whether those of earlier prompts are kept.
        logprobs: `raw_logprobs`, the model's own, or `processed_logprobs`, at the temperature of the request.
    """
    options = {
        "--served-model-name": f"base-{base}",
        "--dtype": dtype,
        "--max-lora-rank": str(rank),
        "--max-loras": str(adapters),
        "--max-num-seqs": str(slots),
        "--max-model-len": str(context),
        "--generation-config": "vllm",
        "--structured-outputs-config": '{"backend": "guidance"}',
        "--logprobs-mode": logprobs,
    }
    switches = ["--enable-lora", "--disable-uvicorn-access-log"]
    switches.append("--enable-prefix-caching" if prefixes else "--no-enable-prefix-caching")
    modules = sorted({layer.rpartition(".")[2] for layer in layers})
    return [*(word for option in options.items() for word in option), *switches, "--lora-target-modules", *modules]


def adapter_name(digest: str) -> str:
    return f"adapter-{digest}"


def adaptable_layers(base: Base) -> list[str]:
    """Return the linear layers of a base but its head: vLLM makes room for adapters on these.

    Raises:
        InputError: its modules cannot be built.
    """
    model = skeleton(base)
    require(model is not None, "model", base.id, "its modules cannot be built without its weights", "Serve it merged.")
    left_out = {model.get_input_embeddings(), model.get_output_embeddings()}
    return [name for name in adaptable(model) if model.get_submodule(name) not in left_out]


def check_servable(folder: Path, most: int | None, layers: Collection[str]) -> int:
    """Check that vLLM can serve an adapter. Returns its rank.

    Args:
        most: the rank that there is room for; None for what vLLM has room for at all.
        layers: see `adaptable_layers`.

    Raises:
        CorruptFile, InputError: it cannot.
    """
    config = adapter_config(folder)
    adapter = read_adapter(folder)
    check_plain(adapter)
    require(not adapter.scores, "adapter", folder.name, "is a reward model", "Serve it without serve=vllm.")
    other = next((name for name in adapter.ranks if name not in layers), None)
    problem = "is no linear layer of the base but its head, and vLLM makes room for adapters on these"
    require(other is None, "target_modules", other, problem, "Serve it merged: export=merged.")
    check_targets(config, adapter.ranks, layers)
    rank = max(adapter.ranks.values())
    room = vllm_rank(rank) if most is None else most
    problem = f"is over {most}, the rank that vLLM made room for"
    require(rank <= room, "r", rank, problem, "Start the server with a higher stage.max_rank.")
    return rank


def max_lora_rank(folders: Sequence[Path], most: int | None, layers: Collection[str]) -> int:
    """Return the rank that vLLM makes room for: `most`, or the highest of the adapters.

    Raises:
        CorruptFile, InputError: see `check_servable`.
    """
    room = None if most is None else vllm_rank(most)
    ranks = [check_servable(folder, room, layers) for folder in folders]
    return room or vllm_rank(max([LOWEST, *ranks]))
