"""What is asked of vLLM's server. It has further addresses, some of which change its weights; no request of anybody's
is passed on to it."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from align.errors import AlignError

COMPLETIONS, LOAD, UNLOAD, MODELS = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"
URL = "http://vllm"
logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for each request
UNLOAD_S = 10
SLOWEST_S = 600
"""How long it may take to load an adapter, or to read some prompts."""
TOKEN = "token_id:"
"""What stands before a token's id where vLLM names tokens."""


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
        self._blocking = httpx.Client(transport=transport(at), base_url=address(at), timeout=SLOWEST_S)

    def close(self) -> None:
        self._blocking.close()

    def up(self) -> bool:
        """Whether it answers."""
        with suppress(httpx.TransportError):
            return self._blocking.get("/health", timeout=UNLOAD_S).status_code == 200
        return False

    def base(self) -> str:
        """The name of the model that it was started with. Raises: VllmFailed."""
        with understood(MODELS):
            return str(said(self._blocking.get(MODELS))["data"][0]["id"])

    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        with understood(MODELS):
            return int(said(self._blocking.get(MODELS))["data"][0]["max_model_len"])

    def load(self, name: str, folder: Path) -> None:
        """Raises: VllmFailed."""
        said(self._blocking.post(LOAD, json={"lora_name": name, "lora_path": str(folder)}))

    def unload(self, name: str) -> None:
        """Also where there is no such adapter. Raises: VllmFailed."""
        answer = self._blocking.post(UNLOAD, json={"lora_name": name}, timeout=UNLOAD_S)
        if answer.status_code != 404:
            said(answer)

    def knows(self, name: str) -> bool:
        """Whether anything answers by this name. Raises: VllmFailed: it does neither that nor say so by a 404."""
        answer = self._blocking.post(COMPLETIONS, json={"model": name, "prompt": [0, 0], "max_tokens": 1})
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
                told = said(self._blocking.post(COMPLETIONS, json=asked))["choices"][0]["logprobs"]["token_logprobs"]
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
                if answer.status_code != 200:
                    await answer.aread()
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


def address(at: Path | str) -> str:
    return URL if isinstance(at, Path) else at


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
        *lines, rest = (rest + piece).split(b"\n")
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
