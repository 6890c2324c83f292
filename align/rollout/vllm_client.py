"""Requests to a vLLM server, and its responses. Requests of clients of `stage=serve` are not passed on as they are,
because some of vLLM's routes change its weights.

Imports no torch: evaluations use the same functions to read the responses of other servers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from align.core.errors import AlignError, require
from align.core.redaction import MASK

if TYPE_CHECKING:
    from align.rollout.serving_engine import SamplingParams

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
