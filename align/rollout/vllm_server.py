"""A vLLM server, started here or running already: its process, its arguments, the adapters that it is given, and
requests to it. It has further addresses, some of which change its weights: no client's request is passed on to it.

Imports no torch: an evaluation reads the responses of other servers by the same functions."""

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
from align.rollout.engine_process import last_words, vllm_rank
from align.rollout.probes import NOT_BY_THIS, Logprobs, Probes, agreement, check_agreement, describe_agreement

if TYPE_CHECKING:
    from align.rollout.serving_engine import SamplingParams
    from align.run import Base

T = TypeVar("T")
COMPLETIONS = "/v1/completions"
LOAD = "/v1/load_lora_adapter"
UNLOAD = "/v1/unload_lora_adapter"
MODELS = "/v1/models"
logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request
SHORT_S = 10
SLOWEST_S = 600
"""How long it may take to load an adapter, or to read some prompts."""
TOKEN = "token_id:"
"""What stands before a token's id where vLLM names tokens."""
FEW_BYTES = 1 << 20
"""The most that is read of a response without tokens."""
TOKEN_BYTES = 2048
"""The most that is read of each token beside it; about 150 are usual."""
LINE_BYTES = 1 << 28
"""The most that is read of one line of a stream, which may hold the logprobs of a whole prompt."""
BUSY = 429
LOCKED = (401, 403)
"""The statuses of a server that asks for a key, or for another."""
KEY = "VLLM_API_KEY"
"""The variable of the environment from which vLLM's own server reads the key that it asks for."""
NO_SEED = -1
"""The seed that vLLM takes for none."""
OTHER_SEED = -(2**63)
MISREAD = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)
"""What reading JSON of another form than the expected raises."""


class VllmFailed(AlignError):
    """vLLM did not do what it was asked.

    Attributes:
        status: of its response; 0 if there was none.
        path: the address that was asked.
    """

    def __init__(self, message: str, status: int = 0, path: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.path = path


class VllmGone(VllmFailed):
    """vLLM cannot be reached, is overloaded or is broken, and may do what it was asked once it is back."""


@contextmanager
def refuse_other_forms(path: str) -> Iterator[None]:
    """Raise VllmFailed if the block cannot read a response because it has another form than vLLM's."""
    try:
        yield
    except AlignError:
        raise
    except (*MISREAD, httpx.DecodingError) as error:
        message = f"vLLM answers {path} in another form than vLLM's ({type(error).__name__})"
        raise VllmFailed(message, path=path) from error


class VllmClient:
    """Asks one server. Each method without `async` may be called in any thread that runs no event loop.

    Args:
        target: the socket that the server listens at, or its URL.
    """

    def __init__(self, target: Path | str) -> None:
        self.target = target
        self.headers = request_headers(target)
        self.closed = False

    def connect(self) -> httpx.AsyncClient:
        base_url = self.target if isinstance(self.target, str) else "http://vllm"
        transport = direct_transport(self.target)
        return httpx.AsyncClient(transport=transport, base_url=base_url, timeout=None, headers=self.headers)

    async def request(
        self,
        connection: httpx.AsyncClient,
        method: str,
        path: str,
        body: Any = None,
        tokens: int = 0,
        within_s: float = SLOWEST_S,
        read: Callable[[Any], T] = lambda answer: answer,
    ) -> T:
        """Send a request and read its response, which has to be whole in time.

        Args:
            tokens: that the response may be about.
            read: reads the JSON of the response, or its text if it is no JSON.

        Raises:
            VllmFailed
        """
        try:
            with refuse_other_forms(path):
                async with asyncio.timeout(within_s):
                    response = await read_response(connection, method, path, body, response_limit(tokens))
                check_status(response)
                is_json = "json" in response.headers.get("content-type", "")
                return read(response.json() if is_json else response.text)
        except TimeoutError as error:
            raise VllmGone(f"vLLM does not answer {path} within {within_s:g} seconds", path=path) from error
        except httpx.TransportError as error:
            message = f"vLLM does not answer {path} ({type(error).__name__}: {error})"
            raise VllmGone(message, path=path) from error

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Do the same as `request`, on a connection of its own."""
        if self.closed:
            raise VllmFailed("the client is closed", path=path)

        async def send() -> Any:
            async with self.connect() as connection:
                return await self.request(connection, method, path, body, **options)

        return asyncio.run(send())

    def is_up(self) -> bool:
        """Return whether the server answers. One that asks for a key does: the first question says so."""
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
        """Return the name of the model that the server was started with."""
        return self.ask("GET", MODELS, read=lambda answer: str(answer["data"][0]["id"]))

    def context_length(self) -> int:
        """Return the tokens that a prompt and its answer may have together."""
        return self.ask("GET", MODELS, read=lambda answer: int(answer["data"][0]["max_model_len"]))

    def load(self, name: str, folder: Path) -> None:
        self.ask("POST", LOAD, {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        """Unload an adapter, if there is one of that name."""
        try:
            self.ask("POST", UNLOAD, {"lora_name": name}, within_s=SHORT_S)
        except VllmFailed as error:
            if error.status != 404:
                raise

    def knows(self, name: str) -> bool:
        """Return whether the server answers by this name. Raises VllmFailed if it refuses by another status."""
        try:
            self.ask("POST", COMPLETIONS, {"model": name, "prompt": [0, 0], "max_tokens": 1})
        except VllmFailed as error:
            if error.status != 404:
                raise
            return False
        return True

    def logprobs(self, name: str, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the logprobs, in nats, of each token of a row but the first, given those before it."""

        def read(answer: Any) -> list[float]:
            values = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(row)]
            return [float(values[i]) for i in range(len(row) - 1)]  # one for each, or none is good

        found = []
        for row in rows:
            body = {"model": name, "prompt": list(row), "max_tokens": 0, "echo": True, "logprobs": 0}
            found.append(self.ask("POST", COMPLETIONS, body, tokens=len(row), read=read))
        return found


def completion_body(model: str, prompt_ids: Sequence[int], sampling: SamplingParams) -> dict[str, Any]:
    """Return the body of a request for one answer, with token ids in and out."""
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


def parse_logprobs(logprobs: Mapping[str, Any]) -> list[tuple[int, float | None, list[tuple[int, float]]]]:
    """Return each token's id, its logprob, and the likeliest at its place, best first."""

    def token_id(token: str) -> int:
        return int(token.removeprefix(TOKEN))

    tokens = []
    columns = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    for token, logprob, top in zip(*columns, strict=True):
        ranked = sorted(((token_id(name), value) for name, value in (top or {}).items()), key=lambda each: -each[1])
        tokens.append((token_id(token), logprob, ranked))
    return tokens


async def stream_choices(connection: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
    """Yield the choice of each chunk of a completion. The connection ends with the iterator, and vLLM's work with it.

    Raises:
        VllmFailed: vLLM refuses, fails on the way, or is gone.
    """
    is_whole = False
    try:
        async with connection.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
            check_status(response)
            async for data in iter_events(response.aiter_bytes()):
                if data == b"[DONE]":
                    is_whole = True
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise VllmFailed("vLLM failed on the way: vllm.log says why")
                if chunk.get("choices"):
                    yield chunk["choices"][0]
    except httpx.TransportError as error:
        raise VllmGone(f"vLLM does not answer ({type(error).__name__}: {error})") from error
    if not is_whole:
        raise VllmFailed("vLLM's stream broke off")


async def iter_events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events. A line ends at a line break alone: a text may have Unicode's line ends."""
    rest = b""
    async for piece in pieces:
        rest += piece
        check_size(len(rest), LINE_BYTES, COMPLETIONS)
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ")


def response_limit(tokens: int) -> int:
    """Return how many bytes are read of a response about so many tokens."""
    return FEW_BYTES + TOKEN_BYTES * tokens


async def read_response(connection: httpx.AsyncClient, method: str, path: str, body: Any, limit: int) -> httpx.Response:
    """Send a request and read its response whole.

    Raises:
        VllmFailed: it has more than `limit` bytes.
        httpx.TransportError
    """
    content = bytearray()
    async with connection.stream(method, path, json=body) as response:
        async for piece in response.aiter_bytes():
            content += piece
            check_size(len(content), limit, path, response.status_code)
    kept = {name: response.headers[name] for name in ("content-type", "retry-after") if name in response.headers}
    return httpx.Response(response.status_code, headers=kept, content=bytes(content), request=response.request)


def check_size(size: int, limit: int, path: str, status: int = 0) -> None:
    if size > limit:
        message = f"it answers {path} by more than {limit:,} bytes, and no answer to that has so many"
        raise VllmFailed(message, status, path)


def check_status(response: httpx.Response) -> None:
    """Raise VllmFailed if a response is an error. Its words are not repeated: they can hold a client's."""
    status = response.status_code
    if status != 200:
        path = response.request.url.path
        failure = VllmGone if status >= 500 or status == BUSY else VllmFailed
        raise failure(f"vLLM answers {path} by status {status}: its log says why", status, path)


def request_headers(target: Path | str) -> dict[str, str]:
    """Return the headers that switch compression off, and for a URL, which is no server of ours, those with the key.

    Raises:
        InputError: it can be no key.
    """
    headers = {"accept-encoding": "identity"}
    key = os.environ.get(KEY, "")
    if isinstance(target, str) and key:
        good = key.isascii() and key.isprintable() and " " not in key
        require(good, KEY, MASK, "has characters that no key has", "Set it to the key of the servers, or unset it.")
        headers["authorization"] = f"Bearer {key}"
    return headers


def direct_transport(target: Path | str) -> httpx.AsyncHTTPTransport:
    """Return a transport to a server past any proxy, for any number of requests at once."""
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    if isinstance(target, Path):
        return httpx.AsyncHTTPTransport(uds=str(target), verify=False, limits=unlimited)
    is_plain = urlsplit(target).scheme == "http"  # then no certificates are read, which takes 8 ms
    return httpx.AsyncHTTPTransport(verify=not is_plain, limits=unlimited)


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
        folder: plain LoRA; a copy of ours, so that it is not changed while vLLM may read it.
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
        """Unload an adapter. One that stays takes memory, and it cannot be asked for."""
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
        log.info("vLLM serves %s: %s", adapter or self.base, describe_agreement(agreed))
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

    What is new may be about to be locked by its owner; what holds anything but sockets is not ours; what cannot be
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
        layers: that adapters may be on; vLLM is given the last part of their names. The head is not one: vLLM 0.32
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
    from align.models.adapters import adaptable_modules
    from align.models.load import skeleton

    model = skeleton(base)
    require(model is not None, "model", base.id, "its modules cannot be built without its weights", "Serve it merged.")
    left_out = {model.get_input_embeddings(), model.get_output_embeddings()}
    return [name for name in adaptable_modules(model) if model.get_submodule(name) not in left_out]


def check_servable(folder: Path, most: int | None, layers: Collection[str]) -> int:
    """Check that vLLM can serve an adapter. Returns its rank.

    Args:
        most: the rank that there is room for; None for what vLLM has room for at all.
        layers: see `adaptable_layers`.

    Raises:
        CorruptFile, InputError: it cannot.
    """
    from align.models.adapters import check_targets, read_adapter
    from align.models.plain_lora import check_plain

    adapter = read_adapter(folder, alone=False)
    check_plain(adapter)
    require(not adapter.has_score_head, "adapter", folder.name, "is a reward model", "Serve it without serve=vllm.")
    other = next((name for name in adapter.ranks if name not in layers), None)
    problem = "is no linear layer of the base but its head, and vLLM makes room for adapters on these"
    require(other is None, "target_modules", other, problem, "Serve it merged: export=merged.")
    check_targets(adapter.config, adapter.ranks, layers)
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
