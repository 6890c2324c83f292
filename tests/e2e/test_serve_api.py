"""OpenAI's API, called by OpenAI's own client, on a server with adapters."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import ASKED, TOOLS, Server
from waiting import becomes_true

HELLO: list[Any] = [{"role": "user", "content": "Hello, how are you?"}]


@pytest.fixture(scope="module")
def server(adapter_server: Server) -> Server:
    return adapter_server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat_whole_and_in_chunks_is_the_same(client: openai.OpenAI):
    request: Any = {"model": "one", "messages": HELLO, "max_tokens": 24, "seed": 7, "temperature": 0.8}
    completion = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    choice = completion.choices[0]
    assert choice.message.content
    assert choice.message.role == chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks[-3:-1]] == [None, choice.finish_reason]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], completion.usage)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 24
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 24
    assert len({c.id for c in chunks}) == 1
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**request, stream=True))


def test_logprobs_of_chats(client: openai.OpenAI):
    request: Any = {"model": "two", "messages": HELLO, "max_tokens": 8, "temperature": 0, "logprobs": True}
    completion = client.chat.completions.create(**request, top_logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content or []
    assert len(content) == 8
    assert bytes(b for token in content for b in token.bytes or []).decode() == completion.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 2
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # greedy: the likeliest token
    chunks = client.chat.completions.create(**request, top_logprobs=2, stream=True)
    streamed = [t for c in chunks if (chunk_logprobs := c.choices[0].logprobs) for t in chunk_logprobs.content or []]
    assert streamed == content


def test_scoring_a_text_by_echo(client: openai.OpenAI, server: Server):
    """Send requests as lm-eval does: token ids, the prompt's logprobs, one more token."""
    text = "Hello, how are you?"
    request: Any = {"model": "pocket", "echo": True, "logprobs": 1, "temperature": 0}
    by_text = client.completions.create(**request, prompt=text, max_tokens=0).choices[0]
    assert by_text.text == text
    text_logprobs = by_text.logprobs
    assert text_logprobs is not None
    assert text_logprobs.tokens is not None
    assert "".join(text_logprobs.tokens) == text
    assert (text_logprobs.token_logprobs or [0])[0] is None
    from align.models.base import find_base
    from align.models.load import load_tokenizer

    ids = load_tokenizer(find_base("pocket"))(text, add_special_tokens=False)["input_ids"]
    full, prefix = client.completions.create(**request, prompt=[ids, ids[:3]], max_tokens=1).choices
    assert full.logprobs is not None
    assert prefix.logprobs is not None
    assert full.logprobs.token_logprobs is not None
    assert full.logprobs.token_logprobs[: len(ids)] == text_logprobs.token_logprobs
    assert len(full.logprobs.token_logprobs) == len(ids) + 1
    assert (prefix.logprobs.token_logprobs or [])[1:3] == pytest.approx(full.logprobs.token_logprobs[1:3], abs=1e-5)
    for logprob, top in zip(full.logprobs.token_logprobs[1:], (full.logprobs.top_logprobs or [])[1:], strict=True):
        assert logprob in top.values()
    # Echoed logprobs are those of the model, so a greedy answer has the same logprob as the echoed token.
    greedy = client.completions.create(model="pocket", prompt=text, max_tokens=1, temperature=0, logprobs=0).choices[0]
    assert greedy.logprobs is not None
    assert (greedy.logprobs.token_logprobs or [0.0])[0] == pytest.approx(full.logprobs.token_logprobs[-1], abs=1e-5)
    lists = server.post("/v1/completions", {**request, "prompt": [text, "Hi"], "max_tokens": 0})[1]
    assert [choice["text"] for choice in lists["choices"]] == [text, "Hi"]


def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI):
    request: Any = {"model": "tools", "messages": ASKED, "tools": TOOLS, "temperature": 0, "max_completion_tokens": 60}
    choice = client.chat.completions.create(**request).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("rain", {"in": "Oslo"})
    chunks = list(client.chat.completions.create(**request, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function and c.function.name) for c in calls] == [(0, "rain")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    messages = [*ASKED, choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "dry"}]
    assert client.chat.completions.create(**{**request, "messages": messages}).usage is not None
    assert not client.chat.completions.create(**request, tool_choice="none").choices[0].message.tool_calls
    assert client.chat.completions.create(**{**request, "tools": []}).choices[0].message.tool_calls is None
    assert client.chat.completions.create(**{**request, "model": "one"}).usage is not None  # by the base's own template


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"top_k": 5}, "top_k"),
        ({"n": 1000}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": [{"role": "judge", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, "messages"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools.0.function.name"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_is_not_done_is_refused_by_name(server: Server, body: dict[str, Any], param: str):
    status, answer = server.post("/v1/chat/completions", {"model": "pocket", "messages": HELLO, **body})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["param"].startswith(param)
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_what_changes_nothing_is_passed_over(server: Server):
    neutral = {
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "store": True,
        "metadata": {"a": "b"},
        "user": "ann",
        "stop": None,
        "seed": None,
        "top_p": None,
        "n": None,
        "service_tier": "auto",
        "max_tokens": 1,
        "tools": [],
        "logprobs": None,
        "made_up": 1,
    }
    assert server.post("/v1/chat/completions", {"model": "pocket", "messages": HELLO, **neutral})[0] == 200


def test_typed_errors(client: openai.OpenAI, server: Server):
    for model in ("three", "one@sha256:" + "0" * 64, "", "../one"):
        with pytest.raises(openai.NotFoundError) as raised:
            client.chat.completions.create(model=model, messages=HELLO)
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    for (status, answer), expected in (
        (server.get("/v1/nothing"), (404, "not_found")),
        (server.get("/v1/chat/completions"), (405, "method_not_allowed")),
        *(
            (server.post("/v1/completions", body), (400, "unreadable_body"))
            for body in (b"\xff\xfe{}", b"{not JSON", b"", b"[]", b"[" * 100_000)
        ),
    ):
        assert (status, answer["error"]["code"]) == expected
        assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_who_answers_stands_in_headers_list_and_log(client: openai.OpenAI, server: Server):
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert list(listed) == ["pocket", "one", "two", "tools", "mix"]
    assert (listed["pocket"]["parent"], listed["one"]["parent"]) == (None, "pocket")
    digest = listed["one"]["adapter"]
    assert client.models.retrieve("one").model_dump() == listed["one"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("three")
    raw = client.chat.completions.with_raw_response
    response = raw.create(model=f"one@sha256:{digest[:16]}", messages=HELLO, max_tokens=1)
    assert (response.headers["x-align-adapter"], response.headers["x-align-base"]) == (
        digest,
        listed["pocket"]["base"],
    )
    arms = {}
    for user in map(str, range(12)):
        response_of_user = raw.create(model="mix", messages=HELLO, max_tokens=1, user=user)
        arms[user] = response_of_user.headers["x-align-arm"], response_of_user.headers["x-align-adapter"]
    assert set(arms.values()) == {("one", digest), ("two", listed["two"]["adapter"])}
    repeated = raw.create(model="mix", messages=HELLO, max_tokens=1, user="3")
    assert repeated.headers["x-align-arm"] == arms["3"][0]
    lines: list[dict[str, Any]] = []  # the line is written after the answer is sent
    assert becomes_true(
        lambda: lines.extend(line for line in server.log if line["id"] == repeated.headers["x-request-id"]) or lines
    )
    entry = lines[0]
    assert (entry["asked"], entry["answered"], entry["arm"]) == ("mix", "mix", arms["3"][0])
    assert (entry["adapter"], entry["completion_tokens"], entry["status"]) == (arms["3"][1], 1, 200)
    text = (server.folder / "requests.jsonl").read_text() + (server.folder / "log.txt").read_text()
    assert "Hello, how" not in text


def test_adapters_come_and_go_by_vllms_calls(client: openai.OpenAI, server: Server):
    def load(name: str, path: str, **more: Any) -> tuple[int, Any]:
        return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})

    def complete(model: str) -> tuple[str, str | None]:
        raw = client.chat.completions.with_raw_response.create(model=model, messages=HELLO, max_tokens=8, temperature=0)
        return raw.headers["x-align-adapter"], raw.parse().choices[0].message.content

    assert load("new", "one") == (200, "Success: LoRA adapter 'new' added successfully.")
    before = complete("new")
    assert before == complete("one")
    status, error = load("new", "two")
    assert (status, error["error"]["param"]) == (400, "lora_name")
    long_request: Any = {"messages": HELLO, "max_tokens": 150, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(model="new", **long_request, stream=True) as stream:
        next(stream)
        assert load("new", "two", load_inplace=True)[0] == 200
        assert server.stat("align_requests_running") == 1
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == client.chat.completions.create(model="one", **long_request).choices[0].message.content
    assert complete("new") == complete("two") != before
    for path in ("../one", "/etc", "three", str(Path(__file__).parent)):
        status, error = load("other", path)
        assert (status, error["error"]["param"]) == (400, "lora_path")
    unload = server.post("/v1/unload_lora_adapter", {"lora_name": "new"})
    assert unload == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 404
    with pytest.raises(openai.NotFoundError):
        complete("new")


def test_a_client_that_goes_frees_its_slot(client: openai.OpenAI, server: Server):
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        body = {"model": "pocket", "messages": HELLO, "max_tokens": 900, "stream": stream, "ignore_eos": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        assert becomes_true(lambda: server.stat("align_requests_running") == 1)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        before = server.stat("align_decode_steps_total")
        assert becomes_true(lambda: server.stat("align_requests_running") == 0, 5)
        assert server.stat("align_decode_steps_total") - before < 100
    assert becomes_true(lambda: [line["status"] for line in server.log[-2:]] == [499, 499])


def test_bodies_that_are_too_large_or_never_come(client: openai.OpenAI, server: Server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(100_000_000))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "request_too_large"
    with socket.create_connection(("127.0.0.1", server.port)) as chunked:
        chunked.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nTransfer-Encoding: chunked\r\n\r\n" % server.port
        )
        for _ in range(200):
            chunked.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
        assert chunked.recv(20).startswith(b"HTTP/1.1 413")
    incomplete = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for client_socket in incomplete:
        client_socket.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    with pytest.raises(openai.APIStatusError) as raised:
        client.post("/chat/completions", body={"a": "b" * 1_100_000}, cast_to=object)
    assert raised.value.status_code == 413
    assert client.completions.create(model="pocket", prompt="a", max_tokens=1).choices
    for client_socket in incomplete:
        client_socket.close()


def test_other_pages_and_other_names_are_refused(server: Server):
    body = {"model": "pocket", "messages": HELLO, "max_tokens": 1}
    assert server.post("/v1/chat/completions", body, Origin="http://evil.example")[0] == 403
    assert server.post("/v1/chat/completions", body, Host="evil.example")[0] == 421
    assert server.post("/v1/chat/completions", body, Origin=server.url)[0] == 200


def test_each_answer_is_of_the_weights_that_its_header_names_while_these_change(client: openai.OpenAI, server: Server):
    def load(path: str) -> int:
        return server.post("/v1/load_lora_adapter", {"lora_name": "flip", "lora_path": path, "load_inplace": True})[0]

    def complete(name: str) -> tuple[str, str | None]:
        raw = client.chat.completions.with_raw_response.create(model=name, messages=HELLO, max_tokens=6, temperature=0)
        return raw.headers["x-align-adapter"], raw.parse().choices[0].message.content

    assert load("third") == 200
    assert server.post("/v1/load_lora_adapter", {"lora_name": "fourth", "lora_path": "fourth"})[0] == 200
    expected = {complete("flip"), complete("fourth")}
    statuses = set()
    stop = threading.Event()
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "fourth"})[0] == 200

    def flip() -> None:
        while not stop.is_set():
            statuses.update((load("fourth"), load("third")))

    flipping = threading.Thread(target=flip)
    flipping.start()
    try:
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(complete, ["flip"] * 60))
    finally:
        stop.set()
        flipping.join()
    assert set(answers) == expected
    assert statuses == {200}
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "flip"})[0] == 200


def test_the_seed_decides_and_each_answer_has_its_own(client: openai.OpenAI):
    def complete(**more: Any) -> list[str | None]:
        request: Any = {"model": "pocket", "messages": HELLO, "max_tokens": 12, **more}
        return [choice.message.content for choice in client.chat.completions.create(**request).choices]

    three = complete(seed=5, n=3)
    assert len(set(three)) == 3
    assert complete(seed=5, n=3) == three
    assert complete(seed=5) == three[:1]
    assert complete(seed=6) != three[:1]
    assert complete() != complete()


def test_a_stop_string_never_shows(client: openai.OpenAI):
    request: Any = {"model": "pocket", "prompt": "I am so", "max_tokens": 40, "temperature": 0}
    full_text = client.completions.create(**request).choices[0].text
    assert len(full_text) > 20
    stop = full_text[7:12]
    before = full_text[: full_text.index(stop)]
    cut = client.completions.create(**request, stop=["zzz", stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (before, "stop")
    assert cut.usage is not None
    assert cut.usage.completion_tokens < 40
    pieces = [c.choices[0].text for c in client.completions.create(**request, stop=stop, stream=True)]
    assert "".join(pieces) == before


def test_an_answer_that_fails_harms_no_other(client: openai.OpenAI, server: Server):
    """An adapter whose files changed on disk does not answer; all other requests are answered."""
    folder = server.folder.parents[2] / "adapters"
    assert server.post("/v1/load_lora_adapter", {"lora_name": "spoilt", "lora_path": "spoilt"})[0] == 200
    shutil.copy(folder / "two" / "adapter_model.safetensors", folder / "spoilt")
    request: Any = {"model": "spoilt", "messages": HELLO, "max_tokens": 4}
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(**request)
    assert str(folder) not in str(raised.value.body)
    with pytest.raises(openai.APIError, match="had an error"):
        list(client.chat.completions.create(**request, stream=True))
    assert becomes_true(lambda: [line["status"] for line in server.log[-2:]] == [500, 500])
    assert client.chat.completions.create(**{**request, "model": "two"}).choices
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "spoilt"})[0] == 200
