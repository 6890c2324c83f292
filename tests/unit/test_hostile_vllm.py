"""Responses that vLLM never gives: each ends the run with an error that names the server, and is not trained on."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from align.config.groups import RolloutConfig, is_server_url
from align.core.errors import InputError, NonFiniteLogits
from align.rollout.vllm_client import (
    KEY,
    TOKEN_BYTES,
    VllmClient,
    VllmFailed,
    VllmGone,
    build_direct_transport,
    build_request_headers,
    compute_response_limit,
)
from align.rollout.vllm_sampler import VllmSampler
from align.rollout.vllm_server import VllmServer

STOP = 2
VOCABULARY = 10
LIMIT = 4


class Garbage(BaseHTTPRequestHandler):
    body: bytes = b""
    forever = False
    status = 200
    authorizations: ClassVar[list[str | None]] = []

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))  # unread, closing the connection would reset it
        self.authorizations.append(self.headers.get("authorization"))
        self.send_response(self.status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(self.body)
        with suppress(OSError):  # the client has closed the connection
            while self.forever:
                self.wfile.write(b" " * (1 << 16))

    do_GET = do_POST = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def client() -> Iterator[VllmClient]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Garbage)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield VllmClient(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


DEEP = b"[" * 100_000
BODIES = (
    b"",
    b"not JSON",
    b"null",
    b"[]",
    b"{}",
    b'{"data": []}',
    b'{"data": {}, "choices": []}',
    b"\xff\xfe",
    DEEP,
    b'{"data": [{}], "choices": [{}]}',
    b'{"data": [null], "choices": [{"logprobs": null}]}',
)
LOGPROBS = ([], [None], [None, -1.0], [None, "x", "y"], [None, [], {}], {"a": 1}, 3)


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_what_is_no_answer_is_said_to_be_none(client: VllmClient, body: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Garbage, "body", body)
    for ask in (client.base_name, client.context_length, lambda: client.logprobs("x", [[1, 2, 3]])):
        with pytest.raises(VllmFailed, match="in an unknown format"):
            ask()


@pytest.mark.parametrize("told", LOGPROBS, ids=range(len(LOGPROBS)))
def test_logprobs_that_are_none_or_too_few(client: VllmClient, told: Any, monkeypatch: pytest.MonkeyPatch):
    response = {"choices": [{"logprobs": {"token_logprobs": told}}]}
    monkeypatch.setattr(Garbage, "body", json.dumps(response).encode())
    with pytest.raises(VllmFailed, match="/v1/completions in an unknown format"):
        client.logprobs("x", [[1, 2, 3]])


@pytest.mark.parametrize("start", [b"", b'{"data": [], "choices": [{"text": "', b"[" * 1000])
def test_an_answer_without_an_end_is_not_read_to_its_end(
    client: VllmClient, start: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Garbage, "body", start)
    monkeypatch.setattr(Garbage, "forever", True)
    url = str(client.target)
    requests = (
        client.base_name,
        client.context_length,
        lambda: client.load("x", Path()),
        lambda: client.has_model("x"),
        lambda: client.unload("x"),
    )
    for request in (*requests, lambda: client.logprobs("x", [[1, 2, 3]])):
        with pytest.raises(VllmFailed, match=r"has more than 1,0\d\d,\d\d\d bytes"):
            request()
    assert client.is_up()
    with pytest.raises(InputError, match=rf"^rollout\.urls={url}: fails at the first request .* has more than"):
        build_running_server(url).start_or_connect()
    sampler = build_sampler(url)
    [error] = asyncio.run(sampler._ask({0: {"prompt": [1, 2], "max_tokens": LIMIT}})).values()
    assert isinstance(error, VllmFailed)
    assert str(sampler._explain(sampler.servers[0], error)).startswith(
        f"rollout.urls={url}: cannot do what a request asks for"
    )


def test_an_answer_that_comes_byte_by_byte_has_its_time(client: VllmClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Garbage, "forever", True)
    with pytest.raises(VllmGone, match=r"does not answer /v1/models within 0\.2 seconds"):
        client.ask("GET", "/v1/models", tokens=1 << 30, within_s=0.2)


def test_all_that_tokens_need_is_read():
    """The longest JSON of a token fits: its text escaped, its id, logprob and offset."""
    token = {
        "tokens": ["token_id:99999"],
        "token_logprobs": [-12.345678901234567],
        "top_logprobs": [{"token_id:99999": -12.345678901234567}],
        "text_offset": [10**6],
    }
    assert len(json.dumps(token)) + len(json.dumps("\u4e00" * 128)) + 16 < TOKEN_BYTES
    assert compute_response_limit(10) == compute_response_limit(0) + 10 * TOKEN_BYTES


def test_a_key_goes_to_urls_alone(client: VllmClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY, "k3y-of-the-servers")
    monkeypatch.setattr(Garbage, "authorizations", [])
    monkeypatch.setattr(Garbage, "body", b'{"data": [{"id": "x"}]}')
    url = str(client.target)
    assert VllmClient(url).base_name() == "x"  # the fixture's was made before there was a key
    sampler = build_sampler(url)
    asyncio.run(sampler._ask({0: {"prompt": [1], "max_tokens": 1}}))
    assert Garbage.authorizations == ["Bearer k3y-of-the-servers"] * 2
    assert "authorization" not in build_request_headers(tmp_path / "socket")
    monkeypatch.delenv(KEY)
    assert "authorization" not in build_request_headers(url)


@pytest.mark.parametrize("key", ["two words", "a\nb", "ключ"])
def test_what_is_no_key_is_not_shown(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(
        InputError, match=r"VLLM_API_KEY=\*\*\*: holds characters that are not allowed in a key"
    ) as refused:
        build_running_server("http://x:1")
    assert key not in str(refused.value)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("key", "said"), [("", "asks for a key, and VLLM_API_KEY is not set"), ("k" * 9, "take the key")]
)
def test_a_server_that_asks_for_a_key(
    client: VllmClient, status: int, key: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(KEY, key)
    monkeypatch.setattr(Garbage, "status", status)
    url = str(client.target)
    with pytest.raises(
        InputError, match=rf"^rollout\.urls={url}: .*{said}.* \(status {status}\)\. Set {KEY}"
    ) as raised:
        build_running_server(url).start_or_connect()
    sampler = build_sampler(url)
    [error] = asyncio.run(sampler._ask({0: {"prompt": [1], "max_tokens": 1}})).values()
    assert not isinstance(error, VllmGone)
    assert str(sampler._explain(sampler.servers[0], error)) == str(raised.value)


def test_of_several_servers_the_log_tells_which():
    sampler = build_sampler()
    sampler.python = "/venv/bin/python"
    message = str(sampler._own_server("vllm-1.log").explain(VllmFailed("x", 500), "fails"))
    assert message.startswith(
        "rollout.python=/venv/bin/python (vllm-1.log): fails. Read vllm-1.log in the run's folder"
    )


def build_sampler(url: str = "http://x:1") -> VllmSampler:
    settings = SimpleNamespace(urls=(url,), start_s=1.0)
    sampler = VllmSampler((STOP,), 0, LIMIT, 1.0, 8, None, settings, torch.device("cpu"), 16, 64, Path())
    sampler.vocabulary = VOCABULARY
    sampler.servers = [build_running_server(url)]
    return sampler


def build_running_server(url: str) -> VllmServer:
    return VllmServer("rollout.urls", url, 1.0, "See to this server.")


def read_answer(answer: Any) -> tuple[list[int], list[float]]:
    sampler = build_sampler()
    return sampler._read_answer(sampler.servers[0], answer)


def build_choice(ids: list[Any], values: Any = None, **more: Any) -> dict[str, Any]:
    values = [-1.0] * len(ids) if values is None else values
    logprobs = {"tokens": [f"token_id:{id}" for id in ids], "token_logprobs": values, "top_logprobs": [None] * len(ids)}
    return {"token_ids": ids, "logprobs": logprobs, **more}


@pytest.mark.parametrize("ids", [[5, STOP], [STOP], [5, 6, 7, 8], [5, 6, 7, STOP]])
def test_a_good_answer_is_read(ids: list[int]):
    assert read_answer(build_choice(ids)) == (ids, [-1.0] * len(ids))


BAD: dict[str, Any] = {
    "nothing": None,
    "text": "x",
    "a list": [],
    "empty": {},
    "no ids": build_choice([5, STOP], token_ids=None),
    "no logprobs": build_choice([5, STOP], logprobs=None),
    "ids as text": build_choice(["a", "b"]),
    "huge": build_choice([10**9, STOP]),
    "larger than any": build_choice([2**70, STOP]),
    "negative": build_choice([-1, STOP]),
    "one more": build_choice([VOCABULARY, STOP]),
    "fewer logprobs": build_choice([5, STOP], [-1.0]),
    "logprobs as text": build_choice([5, STOP], ["a", "b"]),
    "a logprob is missing": build_choice([5, STOP], [-1.0, None]),
    "too long": build_choice([5, 6, 7, 8, STOP]),
    "longer than asked": build_choice([5] * 9),
    "behind a stop": build_choice([5, STOP, 6, STOP]),
    "ended early": build_choice([5, 6]),
    "other tokens": build_choice([5, STOP], token_ids=[6, STOP]),
    "no tokens": build_choice([]),
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_a_bad_answer_is_the_servers_fault(answer: Any):
    with pytest.raises(InputError, match=r"^rollout\.urls=http://x:1: "):
        read_answer(answer)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_logprob_that_is_no_number_names_the_server(value: float):
    with pytest.raises(NonFiniteLogits, match="http://x:1 reports"):
        read_answer(build_choice([5, STOP], [-1.0, value]))


@pytest.mark.parametrize(("status", "is_gone"), [(400, False), (404, False), (429, True), (500, True), (503, True)])
def test_who_is_gone_is_asked_again_and_who_refuses_is_not(
    client: VllmClient, status: int, is_gone: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Garbage, "status", status)
    with pytest.raises(VllmFailed, match=f"by status {status}") as failed:
        client.base_name()
    assert isinstance(failed.value, VllmGone) is is_gone


def test_a_server_that_nobody_reaches_is_gone():
    with pytest.raises(VllmGone, match="does not answer /v1/models"):
        VllmClient("http://127.0.0.1:9").base_name()


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("http://h", True),
        ("http://h:8000", True),
        ("https://h:1/", True),
        ("http://[::1]:80", True),
        ("http://[::1", False),
        ("http://h:abc", False),
        ("http://h:99999", False),
        ("http://h ost", False),
        ("http://h:80#x", False),
        ("http://h:80;x", False),
        ("http://h/v1", False),
        ("http://u:p@h", False),
        ("http://h?x=1", False),
        ("ftp://h", False),
        ("h:80", False),
        ("", False),
        ("http://", False),
        ("http://h:0", False),
    ],
)
def test_addresses(url: str, good: bool):
    assert is_server_url(url) is good


def test_one_server_is_named_once_however_it_is_written():
    with pytest.raises(InputError, match="is given twice"):
        RolloutConfig(engine="vllm", urls=["http://a:1", "http://a:1/"])


@pytest.mark.parametrize("url", ["https://vllm.example.org", "HTTPS://vllm.example.org", "Https://vllm.example.org"])
def test_certificates_are_verified_however_the_scheme_is_written(url: str):
    assert build_direct_transport(url)._pool._ssl_context.verify_mode == ssl.CERT_REQUIRED  # pyright: ignore
