"""A vLLM server, started here or running already: its process, its arguments and its adapters. Requests to it are in
`align.rollout.vllm_client`. Imports no torch."""

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
from typing import TYPE_CHECKING, NamedTuple

from align.core.errors import InputError, require
from align.rollout.engine_process import choose_vllm_rank, find_error_line
from align.rollout.probes import NOT_BY_THIS, Logprobs, Probes, compute_agreement, describe_agreement, require_agreement
from align.rollout.vllm_client import KEY, LOCKED, VllmClient, VllmFailed

if TYPE_CHECKING:
    from align.run import Base

log = logging.getLogger(__name__)
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
"""Program that starts vLLM and ends it with this process, even if that is killed: vLLM holds the GPU's memory.

A forked child waits until the pipe to this process is closed. PR_SET_PDEATHSIG would fire when the thread that started
vLLM ends, and a sampler in the background starts servers from threads that end.
"""
SOCKETS = "align-vllm-"
"""Prefix of the names of temporary folders that hold a vLLM server's sockets."""
NEW_S = 60
"""Age in seconds up to which a folder of sockets counts as new, and is not removed as abandoned."""
LONGEST = 70
"""Maximum length of the temporary folder's path, since the path of a socket has at most 107 bytes."""
STOPPING_S = 10.0
"""Seconds that a vLLM server has to shut down before it is killed."""
LOOK_S = 0.2
"""Seconds between two checks whether a starting server responds."""
NO_CAUSE = "See root cause above"
"""Substring of vLLM's log lines that only refer to the real error in another line."""
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
LOWEST = 16
"""Lowest `max_lora_rank` that a server is started with: adapters of this rank are the most common."""


class ServedAdapter(NamedTuple):
    """An adapter prepared for vLLM: a name, a copy of its files, and logprobs to check it by.

    Attributes:
        name: its name in vLLM. Other weights must not reuse it, because vLLM caches results by name.
        folder: a private copy as plain LoRA, which does not change while vLLM may read it.
        probes: prompts with the logprobs that vLLM must return.
    """

    name: str
    folder: Path
    probes: Probes


class VllmProcess:
    """A process of `vllm serve`, which listens on a Unix socket that only its owner can open.

    Args:
        python: path of the Python that has vLLM.
        model: folder of the base.
        arguments: further command-line arguments.
        log: file to which its output is appended.
    """

    def __init__(self, python: str, model: Path, arguments: Sequence[str], log: Path) -> None:
        parent = Path("/tmp" if len(tempfile.gettempdir()) > LONGEST else tempfile.gettempdir())
        remove_abandoned_folders(parent)
        self._folder = tempfile.TemporaryDirectory(prefix=SOCKETS, dir=parent)  # created with mode 0700
        self._lock = try_lock_folder(Path(self._folder.name))
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
                env=build_environment(os.environ, self._folder.name),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def get_error_line(self) -> str:
        """Return the line of the process's output that most likely says why it did not start."""
        with self.log.open("rb") as output:
            output.seek(self._log_start)
            lines = output.read().decode(errors="replace").splitlines()
        return find_error_line("\n".join(line for line in lines if NO_CAUSE not in line))

    def stop(self, within_s: float) -> None:
        """Terminate the process, kill it and its children after `within_s` seconds, and delete its folder of sockets.

        Further calls do nothing.
        """
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
    """A vLLM server with a base model and adapters, started here or running already.

    Args:
        setting: the config key that names the server, for error messages.
        label: the value of that key, for error messages; the URL of a running server.
        start_s: time limit for the start in seconds.
        remedy: remedy for error messages.
        start: starts the server's process; None for a server that runs already.

    Attributes:
        base: name of the server's base model.
        loaded: names of the loaded adapters.
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

    def start_or_connect(self) -> None:
        """Start the server's process, or start it again if it runs, and wait until the server responds.

        A server that others run is only waited for. Its adapters count as not loaded.

        Raises:
            InputError: it does not start, or answers to names of models that were never loaded.
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
            raise self.explain(error, f"fails at the first request ({error})") from error

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + self.start_s
        is_announced = self.process is not None  # the caller announces a server that it starts
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
        reason = "ended while it started" if has_ended else f"was not ready within {self.start_s:g} seconds"
        problem = f"vLLM {reason} ({self.process.get_error_line()})"
        self.process.stop(0)
        group = self.setting.partition(".")[0]
        remedy = f"Read {self.process.log}, and correct {group}.args, or give it more time by {group}.start_s."
        return InputError(self.setting, self.label, problem, remedy)

    def _refuse_unknown_names(self) -> None:
        is_known = self.client.has_model(f"never-given-{secrets.token_hex(32)}")
        problem = "it answers requests for a model that was never loaded, instead of with status 404"
        require(not is_known, self.setting, self.label, problem, "Use another vLLM.")

    def load(self, adapter: ServedAdapter) -> None:
        """Load an adapter into the server, unless it is loaded already.

        Raises:
            VllmFailed: vLLM does not load it.
            InputError: vLLM answers to names of models that were never loaded.
        """
        if adapter.name in self.loaded:
            return
        if self.process is None:  # a server that was unreachable for a moment may still have it
            self.client.unload(adapter.name)
        self.client.load(adapter.name, adapter.folder)
        self.loaded.add(adapter.name)
        self._refuse_unknown_names()

    def unload(self, adapter: ServedAdapter) -> None:
        """Unload an adapter from the server. A failure is only logged: the adapter takes memory, but is not used."""
        try:
            self.client.unload(adapter.name)
        except VllmFailed as error:
            log.warning("%s stays in vLLM: %s", adapter.name, error)
        self.loaded.discard(adapter.name)

    def check(
        self, adapter: str | None, probes: Probes, dtype: str, field: str, value: str, remedy: str = NOT_BY_THIS
    ) -> None:
        """Raise InputError if the server's logprobs of probe prompts differ too much from the expected ones.

        This checks that the server applies an adapter, or that it has the right base.

        Args:
            adapter: the adapter's name; None for the base.
            dtype: dtype that decides the allowed difference of logprobs.
            field, value, remedy: parts of the error message.

        Raises:
            VllmFailed: the server does not answer the probes.
            InputError: the server does not serve the weights that were trained.
        """
        if self._base_logprobs[0] != probes.rows:
            self._base_logprobs = probes.rows, self.client.logprobs(self.base, probes.rows)
        base_logprobs = self._base_logprobs[1]
        logprobs = self.client.logprobs(adapter, probes.rows) if adapter else base_logprobs
        agreed = compute_agreement(logprobs, base_logprobs, probes)
        log.info("vLLM serves %s: %s", adapter or self.base, describe_agreement(agreed))
        require_agreement(agreed, dtype, field, value, remedy)

    def explain(self, error: VllmFailed, problem: str, remedy: str = "") -> InputError:
        """Convert a failed request to an InputError with `problem`, or about the API key for status 401 and 403."""
        if error.status in LOCKED:
            has_key = bool(os.environ.get(KEY))
            problem = f"does not take the key in {KEY}" if has_key else f"asks for a key, and {KEY} is not set"
            problem = f"{problem} (status {error.status})"
            remedy = f"Set {KEY} in the environment to the key that the server was started with (--api-key)."
        return InputError(self.setting, self.label, problem, remedy or self.remedy)

    def close(self, within_s: float = STOPPING_S) -> None:
        """Stop the server if it was started here, and let later requests of other threads fail.

        May be called again.
        """
        self._closed = True
        if self.process is not None:
            self.process.stop(within_s)
        if hasattr(self, "client"):
            self.client.closed = True


def try_lock_folder(folder: Path) -> int | None:
    """Lock a folder, and return the descriptor that holds the lock until it is closed, or None if it is locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def remove_abandoned_folders(parent: Path) -> None:
    """Remove the folders of sockets in `parent` that killed vLLM servers have left behind.

    Such a server was killed together with the child that would remove its folder.

    New folders are skipped, because their owner may be about to lock them; so are folders that hold anything but
    sockets, and those of other users.
    """
    for folder in parent.glob(f"{SOCKETS}*"):
        with suppress(OSError):
            descriptor = try_lock_folder(folder) if time.time() - folder.lstat().st_mtime > NEW_S else None
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


def build_environment(variables: Mapping[str, str], sockets: str) -> dict[str, str]:
    """Build vLLM's environment from `variables`, without ones that redirect its Python or make it require a key.

    Args:
        sockets: folder for vLLM's own sockets.
    """
    excluded = ("PYTHONPATH", "PYTHONHOME", KEY)
    inherited = {name: value for name, value in variables.items() if name not in excluded}
    return {**inherited, **ENVIRONMENT, "VLLM_RPC_BASE_PATH": sockets}


def build_serve_arguments(
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
    """Build the command-line arguments of `vllm serve` for a base model with LoRA adapters.

    Args:
        base: digest of the base, which is part of its served name.
        layers: layers that adapters may have; vLLM gets the last part of their names. They must not include the head:
            with adapters on the head, vLLM 0.32 crashes if one request has prompt logprobs and another an answer.
        rank: maximum rank of an adapter.
        adapters: maximum adapters in one batch.
        slots: maximum requests at once.
        context: maximum tokens of a prompt and its answer.
        prefixes: whether to cache prefixes of prompts.
        logprobs: `raw_logprobs` for the model's own, or `processed_logprobs` for those at the request's temperature.
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


def build_adapter_name(digest: str) -> str:
    return f"adapter-{digest}"


def list_adaptable_layers(base: Base) -> list[str]:
    """Return the names of a base's linear layers that adapters in vLLM may change: all except the head.

    Raises:
        InputError: the base's modules cannot be built without its weights.
    """
    from align.models.adapters import list_adaptable_modules
    from align.models.load import build_skeleton

    model = build_skeleton(base)
    require(model is not None, "model", base.id, "its modules cannot be built without its weights", "Serve it merged.")
    excluded = {model.get_input_embeddings(), model.get_output_embeddings()}
    return [name for name in list_adaptable_modules(model) if model.get_submodule(name) not in excluded]


def read_servable_rank(folder: Path, max_rank: int | None, layers: Collection[str]) -> int:
    """Return the rank of the adapter in a folder, or raise InputError if vLLM cannot serve the adapter.

    Args:
        max_rank: the server's maximum rank; None for the highest that vLLM supports.
        layers: see `list_adaptable_layers`.

    Raises:
        CorruptFile, InputError: vLLM cannot serve the adapter.
    """
    from align.models.adapters import read_adapter, require_configured_modules
    from align.models.plain_lora import refuse_unsupported_adapter

    adapter = read_adapter(folder, is_only_adapter=False)
    refuse_unsupported_adapter(adapter)
    require(not adapter.has_score_head, "adapter", folder.name, "is a reward model", "Serve it without serve=vllm.")
    unsupported_layer = next((name for name in adapter.ranks if name not in layers), None)
    problem = "is no linear layer of the base but its head, and vLLM supports adapters only on these"
    require(unsupported_layer is None, "target_modules", unsupported_layer, problem, "Serve it merged: export=merged.")
    require_configured_modules(adapter.config, adapter.ranks, layers)
    rank = max(adapter.ranks.values())
    max_rank = choose_vllm_rank(rank) if max_rank is None else max_rank
    problem = f"is over {max_rank}, the maximum rank that vLLM was started with"
    require(rank <= max_rank, "r", rank, problem, "Start the server with a higher stage.max_rank.")
    return rank


def choose_max_lora_rank(folders: Sequence[Path], max_rank: int | None, layers: Collection[str]) -> int:
    """Return the `max_lora_rank` to start vLLM with: for `max_rank` if given, else for the adapters in `folders`.

    Raises:
        CorruptFile, InputError: see `read_servable_rank`.
    """
    max_rank = None if max_rank is None else choose_vllm_rank(max_rank)
    ranks = [read_servable_rank(folder, max_rank, layers) for folder in folders]
    return max_rank or choose_vllm_rank(max([LOWEST, *ranks]))
