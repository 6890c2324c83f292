"""A vLLM server, started here or running already: its process, its arguments, its adapters, and requests to it.
Clients' requests are not passed on to it, because some of its routes change its weights.

Imports no torch: evaluations use the same functions to read the responses of other servers."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from align.core.errors import AlignError, InputError, require
from align.core.redaction import MASK
from align.rollout.engine_process import choose_vllm_rank, find_error_line
from align.rollout.probes import NOT_BY_THIS, Logprobs, Probes, compute_agreement, describe_agreement, require_agreement

if TYPE_CHECKING:
    from align.rollout.serving_engine import SamplingParams
    from align.run import Base

T = TypeVar("T")
COMPLETIONS = "/v1/completions"
LOAD = "/v1/load_lora_adapter"
UNLOAD = "/v1/unload_lora_adapter"
MODELS = "/v1/models"
logging.getLogger("httpx").setLevel(logging.WARNING)  # below, it logs each request
SHORT_S = 10
SLOWEST_S = 600
"""Time limit in seconds for loading an adapter into vLLM, or computing logprobs of some prompts."""
TOKEN = "token_id:"
"""Prefix of the names of tokens in vLLM's logprobs, before the token id."""
FEW_BYTES = 1 << 20
"""Maximum size in bytes of a response without tokens."""
TOKEN_BYTES = 2048
"""Maximum additional size of a response in bytes for each token; about 150 are usual."""
LINE_BYTES = 1 << 28
"""Maximum size in bytes of one line of a stream, which may hold the logprobs of a whole prompt."""
BUSY = 429
LOCKED = (401, 403)
"""HTTP statuses of a server that requires an API key, or another one."""
KEY = "VLLM_API_KEY"
"""Environment variable from which vLLM's server reads its API key."""
NO_SEED = -1
"""Seed that vLLM treats as no seed."""
OTHER_SEED = -(2**63)
MISREAD = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)
"""Exceptions that reading JSON of an unexpected form may raise."""


class VllmFailed(AlignError):
    """An error for a failed request to vLLM.

    Attributes:
        status: status of the response; 0 if there was no response.
        path: path of the request.
    """

    def __init__(self, message: str, status: int = 0, path: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.path = path


class VllmGone(VllmFailed):
    """An error for a request that failed because vLLM is unreachable, overloaded or broken.

    It may succeed after a restart.
    """


@contextmanager
def convert_format_errors(path: str) -> Iterator[None]:
    """Convert exceptions from reading a malformed response in the block to VllmFailed."""
    try:
        yield
    except AlignError:
        raise
    except (*MISREAD, httpx.DecodingError) as error:
        message = f"vLLM answers {path} in an unknown format ({type(error).__name__})"
        raise VllmFailed(message, path=path) from error


class VllmClient:
    """An HTTP client of one vLLM server. Methods without `async` may be called in any thread that runs no event loop.

    Args:
        target: the socket of the server, or its URL.
    """

    def __init__(self, target: Path | str) -> None:
        self.target = target
        self.headers = build_request_headers(target)
        self.closed = False

    def connect(self) -> httpx.AsyncClient:
        base_url = self.target if isinstance(self.target, str) else "http://vllm"
        transport = build_direct_transport(self.target)
        return httpx.AsyncClient(transport=transport, base_url=base_url, timeout=None, headers=self.headers)

    async def request(
        self,
        connection: httpx.AsyncClient,
        method: str,
        path: str,
        body: Any = None,
        tokens: int = 0,
        within_s: float = SLOWEST_S,
        parse_response: Callable[[Any], T] = lambda answer: answer,
    ) -> T:
        """Send a request to the server, and return its response as parsed by `parse_response`.

        Args:
            tokens: number of tokens in the response, which limits its size.
            within_s: time limit for the complete response in seconds.
            parse_response: converts the JSON of the response, or its text if it is not JSON.

        Raises:
            VllmFailed: the request failed, or the response has an unexpected form.
        """
        try:
            with convert_format_errors(path):
                async with asyncio.timeout(within_s):
                    response = await read_response(connection, method, path, body, compute_response_limit(tokens))
                require_success(response)
                is_json = "json" in response.headers.get("content-type", "")
                return parse_response(response.json() if is_json else response.text)
        except TimeoutError as error:
            raise VllmGone(f"vLLM does not answer {path} within {within_s:g} seconds", path=path) from error
        except httpx.TransportError as error:
            message = f"vLLM does not answer {path} ({type(error).__name__}: {error})"
            raise VllmGone(message, path=path) from error

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Send one request on a new connection, and return its parsed response, see `request`."""
        if self.closed:
            raise VllmFailed("the client is closed", path=path)

        async def send() -> Any:
            async with self.connect() as connection:
                return await self.request(connection, method, path, body, **options)

        return asyncio.run(send())

    def is_up(self) -> bool:
        """Return whether the server responds to `/health` within `SHORT_S` seconds, even if only by demanding a key.

        The first request then reports the key.
        """
        if self.closed:
            return False

        async def read_status() -> int:
            async with self.connect() as connection, asyncio.timeout(SHORT_S):
                async with connection.stream("GET", "/health") as response:
                    return response.status_code

        with suppress(httpx.TransportError, TimeoutError):
            return asyncio.run(read_status()) in (200, *LOCKED)
        return False

    def base_name(self) -> str:
        """Request the list of models, and return the name of the base that the server was started with."""
        return self.ask("GET", MODELS, parse_response=lambda answer: str(answer["data"][0]["id"]))

    def context_length(self) -> int:
        """Request the list of models, and return the server's maximum tokens of a prompt and its answer together."""
        return self.ask("GET", MODELS, parse_response=lambda answer: int(answer["data"][0]["max_model_len"]))

    def load(self, name: str, folder: Path) -> None:
        self.ask("POST", LOAD, {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        """Unload an adapter from the server. Does nothing if no adapter has that name."""
        try:
            self.ask("POST", UNLOAD, {"lora_name": name}, within_s=SHORT_S)
        except VllmFailed as error:
            if error.status != 404:
                raise

    def has_model(self, name: str) -> bool:
        """Return whether the server completes a prompt with a model of this name: False for status 404.

        Raises VllmFailed for any other error.
        """
        try:
            self.ask("POST", COMPLETIONS, {"model": name, "prompt": [0, 0], "max_tokens": 1})
        except VllmFailed as error:
            if error.status != 404:
                raise
            return False
        return True

    def logprobs(self, name: str, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Request the logprobs in nats of each row's tokens from the second on, given the previous tokens."""

        def read(answer: Any) -> list[float]:
            values = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(row)]
            return [float(values[i]) for i in range(len(row) - 1)]  # IndexError if one is missing

        logprobs = []
        for row in rows:
            body = {"model": name, "prompt": list(row), "max_tokens": 0, "echo": True, "logprobs": 0}
            logprobs.append(self.ask("POST", COMPLETIONS, body, tokens=len(row), parse_response=read))
        return logprobs


def build_completion_body(model: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> dict[str, Any]:
    """Build the body of a completion request to vLLM for one answer, with token ids in and out."""
    numbers = [number for number in (sampling.prompt_logprobs, sampling.logprobs) if number is not None]
    return {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": OTHER_SEED if sampling.seed == NO_SEED else sampling.seed,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,
        "echo": sampling.prompt_logprobs is not None or sampling.max_tokens == 0,
        "logprobs": max(numbers, default=None),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


class TokenLogprob(NamedTuple):
    """A token's id, its logprob, and the ids and logprobs of the likeliest tokens at its position, best first."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


def parse_logprobs(logprobs: Mapping[str, Any]) -> list[TokenLogprob]:
    """Parse the `logprobs` object of vLLM's completion, in which each token is named by its id."""

    def parse_token_id(token: str) -> int:
        return int(token.removeprefix(TOKEN))

    tokens = []
    columns = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    for token, logprob, top in zip(*columns, strict=True):
        ranked = sorted(
            ((parse_token_id(name), value) for name, value in (top or {}).items()), key=lambda each: -each[1]
        )
        tokens.append(TokenLogprob(parse_token_id(token), logprob, ranked))
    return tokens


async def stream_choices(connection: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """Send a completion request to vLLM, and yield the first entry of `choices` in each chunk of the stream.

    Closing the iterator closes the connection, which aborts the request in vLLM.

    Raises:
        VllmFailed: vLLM refused the request, failed while streaming, or is unreachable.
    """
    is_whole = False
    try:
        async with connection.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
            require_success(response)
            async for data in iter_events(response.aiter_bytes()):
                if data == b"[DONE]":
                    is_whole = True
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise VllmFailed("vLLM failed during the answer: vllm.log has the reason")
                if chunk.get("choices"):
                    yield chunk["choices"][0]
    except httpx.TransportError as error:
        raise VllmGone(f"vLLM does not answer ({type(error).__name__}: {error})") from error
    if not is_whole:
        raise VllmFailed("vLLM's stream broke off")


async def iter_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event in a stream of bytes.

    Only "\\n" ends a line: texts may contain Unicode's other line ends.
    """
    incomplete_line = b""
    async for piece in pieces:
        incomplete_line += piece
        require_small_response(len(incomplete_line), LINE_BYTES, COMPLETIONS)
        *lines, incomplete_line = incomplete_line.split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ")


def compute_response_limit(tokens: int) -> int:
    """Return the maximum size in bytes of a response with data of `tokens` tokens."""
    return FEW_BYTES + TOKEN_BYTES * tokens


async def read_response(connection: httpx.AsyncClient, method: str, path: str, body: Any, limit: int) -> httpx.Response:
    """Send a request and read its complete response, or raise VllmFailed if it has more than `limit` bytes.

    Raises:
        VllmFailed: the response has more than `limit` bytes.
        httpx.TransportError: the server is unreachable, or the connection broke.
    """
    content = bytearray()
    async with connection.stream(method, path, json=body) as response:
        async for piece in response.aiter_bytes():
            content += piece
            require_small_response(len(content), limit, path, response.status_code)
    headers = {name: response.headers[name] for name in ("content-type", "retry-after") if name in response.headers}
    return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=response.request)


def require_small_response(size: int, limit: int, path: str, status: int = 0) -> None:
    if size > limit:
        message = f"its answer to {path} has more than {limit:,} bytes, too many for this request"
        raise VllmFailed(message, status, path)


def require_success(response: httpx.Response) -> None:
    """Raise VllmFailed if a response has another status than 200; VllmGone for 429 and from 500 on.

    The message of the response is not repeated: it can contain a client's prompt.
    """
    status = response.status_code
    if status != 200:
        path = response.request.url.path
        failure = VllmGone if status >= 500 or status == BUSY else VllmFailed
        raise failure(f"vLLM answers {path} by status {status}: its log says why", status, path)


def build_request_headers(target: Path | str) -> dict[str, str]:
    """Build request headers that switch compression off, and for a URL authorise by the key in `VLLM_API_KEY`.

    Raises:
        InputError: the key has characters that a header cannot hold.
    """
    headers = {"accept-encoding": "identity"}
    key = os.environ.get(KEY, "")
    if isinstance(target, str) and key:
        is_valid = key.isascii() and key.isprintable() and " " not in key
        require(
            is_valid,
            KEY,
            MASK,
            "holds characters that are not allowed in a key",
            "Set it to the key of the servers, or unset it.",
        )
        headers["authorization"] = f"Bearer {key}"
    return headers


def build_direct_transport(target: Path | str) -> httpx.AsyncHTTPTransport:
    """Build an HTTP transport to a server's socket or URL, with no proxy and no limit on concurrent requests."""
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    if isinstance(target, Path):
        return httpx.AsyncHTTPTransport(uds=str(target), verify=False, limits=unlimited)
    is_plain = urlsplit(target).scheme == "http"  # skips loading certificates, which takes 8 ms
    return httpx.AsyncHTTPTransport(verify=not is_plain, limits=unlimited)


log = logging.getLogger(__name__)

# vLLM must end with this process even if that is killed, because it holds the GPU's memory. A forked child waits until
# the pipe to this process is closed. (PR_SET_PDEATHSIG would fire when the thread that started vLLM ends, and a sampler
# in the background starts servers from threads that end.)
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
