"""What is asked of vLLM's server. It has further addresses, some of which change its weights; no request of anybody's
is passed on to it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from align.core.errors import AlignError, require
from align.core.redaction import MASK

COMPLETIONS, LOAD, UNLOAD, MODELS = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"
URL = "http://vllm"
logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request
UNLOAD_S = 10
SLOWEST_S = 600
"""How long it may take to load an adapter, or to read some prompts."""
TOKEN = "token_id:"
"""What stands before a token's id where vLLM names tokens."""
FEW_BYTES, TOKEN_BYTES, LINE_BYTES = 1 << 20, 2048, 1 << 28
"""The most that is read of an answer without tokens, of each token beside it (about 150 are usual), and of one line of
a stream, which may hold the logprobs of a whole prompt."""
LOCKED = (401, 403)
"""The statuses of a server that asks for a key, or for another."""
KEY = "VLLM_API_KEY"
"""The variable of the environment from which vLLM's own server reads the key that it asks for."""


class VllmFailed(AlignError):
    """vLLM did not do what it was asked.

    Attributes:
        status: that it answered by; 0 where it gave none.
        path: that it was asked at.
    """

    def __init__(self, said: str, status: int = 0, path: str = "") -> None:
        super().__init__(said)
        self.status, self.path = status, path


MISREAD = (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError)
"""What reading JSON of another form than the expected raises."""


@contextmanager
def understood(path: str) -> Iterator[None]:
    """Around the reading of an answer. Raises: VllmFailed: it has another form than vLLM's."""
    try:
        yield
    except AlignError:
        raise
    except (*MISREAD, httpx.DecodingError) as error:
        what = f"vLLM answers {path} in another form than vLLM's ({type(error).__name__})"
        raise VllmFailed(what, path=path) from error


class VllmClient:
    """What waits for its answer. Safe to use from any thread.

    Args:
        at: the socket that it listens at, or a URL.
    """

    def __init__(self, at: Path | str) -> None:
        self.at = at
        self._blocking = httpx.Client(
            transport=transport(at), base_url=address(at), timeout=SLOWEST_S, headers=headers(at)
        )

    def close(self) -> None:
        self._blocking.close()

    def ask(
        self, method: str, path: str, body: Any = None, most: int = FEW_BYTES, within_s: float = SLOWEST_S
    ) -> httpx.Response:
        """An answer, whole.

        Raises:
            VllmFailed: it has more than so many bytes.
            httpx.TransportError: the server is gone, or the answer is not whole in time.
        """
        until, told = time.monotonic() + within_s, bytearray()
        with self._blocking.stream(method, path, json=body, timeout=within_s) as answer:
            for piece in answer.iter_bytes():
                told += bounded(piece, len(told), most, path)
                if time.monotonic() > until:
                    raise httpx.ReadTimeout(f"{path} was not answered within {within_s:g} seconds")
        return whole(answer, bytes(told))

    def up(self) -> bool:
        """Whether it answers. One that asks for a key does: the first question says so."""
        with suppress(httpx.TransportError), self._blocking.stream("GET", "/health", timeout=UNLOAD_S) as answer:
            return answer.status_code in (200, *LOCKED)
        return False

    def base(self) -> str:
        """The name of the model that it was started with. Raises: VllmFailed."""
        with understood(MODELS):
            return str(said(self.ask("GET", MODELS))["data"][0]["id"])

    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        with understood(MODELS):
            return int(said(self.ask("GET", MODELS))["data"][0]["max_model_len"])

    def load(self, name: str, folder: Path) -> None:
        """Raises: VllmFailed."""
        said(self.ask("POST", LOAD, {"lora_name": name, "lora_path": str(folder)}))

    def unload(self, name: str) -> None:
        """Also where there is no such adapter. Raises: VllmFailed."""
        answer = self.ask("POST", UNLOAD, {"lora_name": name}, within_s=UNLOAD_S)
        if answer.status_code != 404:
            said(answer)

    def knows(self, name: str) -> bool:
        """Whether anything answers by this name. Raises: VllmFailed: it does neither that nor say so by a 404."""
        answer = self.ask("POST", COMPLETIONS, {"model": name, "prompt": [0, 0], "max_tokens": 1})
        if answer.status_code == 404:
            return False
        said(answer)
        return True

    def logprobs(self, name: str, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each token of a row but the first, given those before it, in nats. Raises: VllmFailed."""
        found = []
        for row in rows:
            asked = {"model": name, "prompt": list(row), "max_tokens": 0, "echo": True, "logprobs": 0}
            with understood(COMPLETIONS):
                answer = self.ask("POST", COMPLETIONS, asked, most=bytes_of(len(row)))
                told = said(answer)["choices"][0]["logprobs"]["token_logprobs"]
                values = [float(value) for value in told[1 : len(row)]]
                found.append([values[place] for place in range(len(row) - 1)])  # one for each, or none is good
        return found


class StreamingClient(VllmClient):
    """What is asked by one event loop too, of a server at a socket."""

    def __init__(self, socket: Path) -> None:
        super().__init__(socket)
        self._streaming = httpx.AsyncClient(transport=async_transport(socket), base_url=URL, timeout=None)

    async def stream(self, asked: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The choice of each chunk of a completion. Its connection ends with the iterator, and vLLM's work with that.

        Raises:
            VllmFailed: it refuses, fails on the way, or is gone.
        """
        whole = False
        try:
            async with self._streaming.stream("POST", COMPLETIONS, json={**asked, "stream": True}) as answer:
                if answer.status_code != 200:  # its words are not read
                    said(answer)
                async for data in events(answer.aiter_bytes()):
                    if data == b"[DONE]":
                        whole = True
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise VllmFailed("vLLM failed on the way: vllm.log says why")
                    if chunk.get("choices"):
                        yield chunk["choices"][0]
        except httpx.TransportError as error:
            raise VllmFailed(f"vLLM does not answer ({type(error).__name__}: {error})") from error
        if not whole:
            raise VllmFailed("vLLM's stream broke off")

    async def end(self) -> None:
        self.close()
        await self._streaming.aclose()


async def asked_of(
    client: httpx.AsyncClient, body: Mapping[str, Any], most: int, path: str = COMPLETIONS
) -> httpx.Response:
    """A completion, whole. Raises: VllmFailed, httpx.TransportError: as `VllmClient.ask`."""
    told = bytearray()
    async with client.stream("POST", path, json=body) as answer:
        async for piece in answer.aiter_bytes():
            told += bounded(piece, len(told), most, path)
    return whole(answer, bytes(told))


def bytes_of(tokens: int) -> int:
    """The most that an answer about so many tokens is read of."""
    return FEW_BYTES + TOKEN_BYTES * tokens


def bounded(piece: bytes, before: int, most: int, path: str) -> bytes:
    """A piece of an answer. Raises: VllmFailed: with those before it, it is more than is read."""
    if before + len(piece) > most:
        raise VllmFailed(f"it answers {path} by more than {most:,} bytes, and no answer to that has so many", path=path)
    return piece


def whole(answer: httpx.Response, told: bytes) -> httpx.Response:
    """An answer that was read piece by piece, its compression undone."""
    kept = {name: answer.headers[name] for name in ("content-type", "retry-after") if name in answer.headers}
    return httpx.Response(answer.status_code, headers=kept, content=told, request=answer.request)


def address(at: Path | str) -> str:
    return URL if isinstance(at, Path) else at


def headers(at: Path | str) -> dict[str, str]:
    """Nothing is to be compressed; and to a URL, and to no server of ours, the key.

    Raises:
        InputError: it can be no key.
    """
    plain, key = {"accept-encoding": "identity"}, os.environ.get(KEY, "")
    if isinstance(at, Path) or not key:
        return plain
    good = key.isascii() and key.isprintable() and " " not in key
    require(good, KEY, MASK, "has characters that no key has", "Set it to the key of the servers, or unset it.")
    return {**plain, "authorization": f"Bearer {key}"}


def transport(at: Path | str) -> httpx.HTTPTransport:
    """To a server, past whatever proxy there may be."""
    return httpx.HTTPTransport(uds=str(at) if isinstance(at, Path) else None)


def async_transport(at: Path | str) -> httpx.AsyncHTTPTransport:
    """The same, for any number of requests at once."""
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncHTTPTransport(uds=str(at) if isinstance(at, Path) else None, limits=unlimited)


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events. A line ends at a line break alone: a text may have Unicode's other line ends."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + bounded(piece, len(rest), LINE_BYTES, COMPLETIONS)).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line.removeprefix(b"data: ")


def said(answer: httpx.Response) -> Any:
    """The JSON of an answer; its text where it is none. Raises: VllmFailed: it is an error."""
    if answer.status_code != 200:  # its words can hold a client's, and stand in its own log
        status, path = answer.status_code, answer.request.url.path
        raise VllmFailed(f"vLLM answers {path} by status {status}: its log says why", status, path)
    return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text


def ids_and_logprobs(told: Mapping[str, Any]) -> list[tuple[int, float | None, list[tuple[int, float]]]]:
    """Each token of a choice's `logprobs`: its id, its logprob, and the likeliest at its place, best first."""
    found = []
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        ranked = sorted(((number(name), value) for name, value in (top or {}).items()), key=lambda each: -each[1])
        found.append((number(token), logprob, ranked))
    return found


def number(token: str) -> int:
    return int(token.removeprefix(TOKEN))
