"""Requests to a vLLM server. It has further addresses, some of which change its weights: no client's request is passed
on to it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from align.core.errors import AlignError, require
from align.core.redaction import MASK
from align.rollout.requests import SamplingParams

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
