"""A server with a key file, as its tenants see it; and how a server ends."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from processes import Forks
from serving import Server, adapters, free_port, serving
from waiting import settles

HELLO: list[Any] = [{"role": "user", "content": "Hello, how are you?"}]


class Keyed(NamedTuple):
    """Attributes:
    keys: of each tenant.
    """

    server: Server
    keys: dict[str, str]
    folder: Path

    def client(self, tenant: str) -> openai.OpenAI:
        key = self.keys.get(tenant, tenant)
        return openai.OpenAI(base_url=self.server.api, api_key=key, max_retries=0, timeout=60)

    def bearer(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}


def tenant(forks: Forks, folder: Path, name: str, *limits: str) -> str:
    """Makes or changes a tenant; its new key, if it got one."""
    done = forks.run(folder, "stage=serve", "stage.action=key", "stage.keys=keys.json", f"stage.tenant={name}", *limits)
    assert done.status == 0, done
    return "".join(re.findall(r"al-[\w-]+", done.out))


@pytest.fixture(scope="module")
def keyed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    made = adapters(folder / "adapters", "one", "two")
    keys = {
        "ann": tenant(forks, folder, "ann"),
        "root": tenant(forks, folder, "root", "stage.admin=true"),
        "ben": tenant(forks, folder, "ben", "stage.allow=[one]"),
        "eve": tenant(forks, folder, "eve", "stage.requests_per_minute=2"),
        "sue": tenant(forks, folder, "sue", "stage.concurrency=1"),
        "kim": tenant(forks, folder, "kim", "stage.tokens_per_minute=1000"),
        "tim": tenant(forks, folder, "tim", "stage.token_budget=40"),
    }
    words = ("model=pocket", "method=lora", f"stage.roots=[{made}]", "stage.keys=keys.json")
    with serving(forks, folder, *words, f"stage.adapters={{one: {made / 'one'}, two: {made / 'two'}}}") as server:
        yield Keyed(server, keys, folder)


def asked(**more: Any) -> Any:
    return {"model": "one", "messages": HELLO, "max_tokens": 4, **more}


def test_nobody_comes_in_without_a_key(keyed: Keyed):
    for wrong in ("al-" + "a" * 43, "x", "al-"):
        with pytest.raises(openai.AuthenticationError):
            keyed.client(wrong).chat.completions.create(**asked())
    for path in ("/v1/models", "/v1/nothing", "/metrics", "/openapi.json"):
        status, said = keyed.server.get(path)
        assert (status, said["error"]["code"]) == (401, "missing_api_key")
    for path in ("/", "/health", "/ready"):
        assert keyed.server.get(path)[0] == 200
    assert keyed.client("ann").chat.completions.create(**asked()).choices


def test_a_tenant_sees_and_gets_its_own_models(keyed: Keyed):
    ben = keyed.client("ben")
    assert [model.id for model in ben.models.list()] == ["one"]
    assert ben.chat.completions.create(**asked()).choices
    said = set()
    for model in ("two", "pocket", "three"):
        with pytest.raises(openai.NotFoundError) as raised:
            ben.chat.completions.create(**asked(model=model))
        said.add(raised.value.message.replace(model, "…"))
    assert len(said) == 1


def test_administration_needs_its_key(keyed: Keyed):
    body = {"lora_name": "new", "lora_path": "one"}
    assert keyed.server.post("/v1/load_lora_adapter", body, **keyed.bearer("ann"))[0] == 403
    assert keyed.server.get("/metrics", **keyed.bearer("ann"))[0] == 403
    assert keyed.server.post("/v1/load_lora_adapter", body, **keyed.bearer("root"))[0] == 200
    assert keyed.client("ann").chat.completions.create(**asked(model="new")).choices
    assert keyed.server.post("/v1/unload_lora_adapter", {"lora_name": "new"}, **keyed.bearer("root"))[0] == 200


def test_limits_are_429_with_when_to_come_again(keyed: Keyed):
    eve = keyed.client("eve")
    for _ in range(2):
        eve.chat.completions.create(**asked())
    with pytest.raises(openai.RateLimitError) as raised:
        eve.chat.completions.create(**asked())
    assert raised.value.code == "rate_limit_exceeded"
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 31
    sue = keyed.client("sue")
    with sue.chat.completions.create(**asked(max_tokens=500, stream=True)) as stream:
        next(stream)
        with pytest.raises(openai.RateLimitError):
            sue.chat.completions.create(**asked())
    ask = ("/v1/chat/completions", asked())
    assert settles(lambda: keyed.server.post(*ask, **keyed.bearer("sue"))[0] == 200)  # the server hears of it soon


def test_what_was_not_used_of_a_minute_is_given_back(keyed: Keyed):
    kim = keyed.client("kim")
    for _ in range(3):
        assert kim.completions.create(model="pocket", prompt="a", max_tokens=600, stop=[" ", "e", "a", "\n"]).choices


def test_a_budget_is_counted_and_ends(keyed: Keyed):
    tim = keyed.client("tim")
    # It stops long before max_tokens: what was set aside comes back.
    more: Any = {"model": "pocket", "prompt": "a", "max_tokens": 15, "temperature": 0, "stop": [" ", "e", "\n"]}
    usage = tim.completions.create(**more).usage
    assert usage is not None
    assert usage.completion_tokens < 10
    list(tim.completions.create(**more, stream=True))
    with pytest.raises(openai.RateLimitError) as raised:
        tim.completions.create(**{**more, "max_tokens": 40})
    assert raised.value.code == "insufficient_quota"
    assert f"{40 - 2 * usage.total_tokens} tokens" in raised.value.message


def test_a_key_that_is_revoked_opens_nothing_more(keyed: Keyed, forks: Forks):
    dan = tenant(forks, keyed.folder, "dan")
    assert keyed.client(dan).models.list().data
    tenant(forks, keyed.folder, "dan", "stage.revoke=all")
    with pytest.raises(openai.AuthenticationError):
        keyed.client(dan).models.list()


def test_no_key_and_no_prompt_is_written_down(keyed: Keyed):
    keyed.client("ann").chat.completions.create(**asked())
    metrics = keyed.server.get("/metrics", **keyed.bearer("root"))[1]
    with pytest.raises(openai.NotFoundError) as raised:
        keyed.client("ann").chat.completions.create(**asked(model=keyed.keys["ben"]))
    written = [path.read_text(errors="replace") for path in (keyed.folder / "runs").rglob("*") if path.is_file()]
    for text in (*written, metrics, str(raised.value.body)):
        assert "Hello, how" not in text
        assert not any(key in text for key in keyed.keys.values())
    assert str(keyed.folder) not in metrics + str(raised.value.body)
    assert '"tenant": "ann"' in "".join(written)


@pytest.mark.parametrize(("drain_s", "ends"), [("30", "[DONE]"), ("0.2", "shutting down")])
def test_sigterm_lets_what_is_under_way_finish(forks: Forks, tmp_path: Path, drain_s: str, ends: str):
    said, codes = [], []
    with serving(forks, tmp_path, "model=pocket", f"stage.drain_s={drain_s}") as server:
        body = {"model": "pocket", "prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True}
        thread = threading.Thread(target=lambda: said.append(server.post("/v1/completions", body)[1]))
        thread.start()
        assert settles(lambda: server.stat("align_requests_running") == 1)
        server.child.send_signal(signal.SIGTERM)
        if drain_s == "30":
            assert settles(lambda: server.get("/ready")[0] == 503)
            codes = [server.get("/health")[0], server.post("/v1/completions", {**body, "stream": False})[0]]
            assert codes == [200, 503]
        thread.join(60)
        done = server.child.ended(60)
    assert ends in said[0]
    assert (said[0].count('"text"') > 250) == (drain_s == "30")
    assert done.status == 0, done
    assert "fault" not in done.err
    assert done.out.splitlines()[-1].endswith("runs/serve/s")
    assert next(line for line in server.log if line["stream"])["status"] == (200 if drain_s == "30" else 503)


def test_what_a_client_received_is_counted_when_the_server_is_killed(forks: Forks, tmp_path: Path):
    key = tenant(forks, tmp_path, "ann", "stage.token_budget=100000")
    with serving(forks, tmp_path, "model=pocket", "stage.keys=keys.json") as server:
        client = openai.OpenAI(base_url=server.api, api_key=key, max_retries=0)
        more: Any = {"model": "pocket", "prompt": [[10, 20, 30]], "max_tokens": 900, "extra_body": {"ignore_eos": True}}
        received: list[Any] = []

        def read() -> None:
            for chunk in client.completions.create(**more, stream=True):
                received.append(chunk)
                if len(received) == 30:
                    server.child.send_signal(signal.SIGKILL)

        with pytest.raises(openai.APIConnectionError):
            read()
        server.child.ended()
    said = forks.run(tmp_path, "stage=serve", "stage.action=tenants", "stage.keys=keys.json").out
    requests, tokens, _, _ = said.splitlines()[-1].split()[-4:]
    assert requests == "1", said
    assert len(received) <= int(tokens) - 3 < 900


def test_an_interrupt_ends_it_and_the_same_line_starts_it_again(forks: Forks, tmp_path: Path):
    port = free_port()
    for round in (1, 2):
        with serving(forks, tmp_path, "model=pocket", port=port) as server:
            assert server.post("/v1/completions", {"model": "pocket", "prompt": "a", "max_tokens": 2})[0] == 200
            began = time.monotonic()
            server.child.send_signal(signal.SIGINT)
            assert server.child.ended(30).status == 0
            assert time.monotonic() - began < 10
        assert len(server.log) == round
