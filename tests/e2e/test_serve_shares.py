"""A tenant's limits on a server: they are checked before anything is computed, and reported to the tenant."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from processes import Forks
from serving import Server, run_serve_stage, write_adapters
from waiting import becomes_true

from align.serve.rate_limits import REFUSAL_BURST
from align.serve.tenants import change_tenant

HELLO: list[Any] = [{"role": "user", "content": "Hello, how are you?"}]
LONG: list[Any] = [{"role": "user", "content": "word " * 5000}]
LIMITS: dict[str, dict[str, int | None]] = {
    "ann": {},
    "dan": {},
    "eve": {"requests_per_minute": 1},
    "kim": {"tokens_per_minute": 60},
    "lea": {"tokens_per_minute": 120},
    "max": {"tokens_per_minute": 30, "requests_per_minute": 50},
    "sue": {"concurrency": 3},
    "tim": {"token_budget": 60},
    "bob": {"token_budget": 70},
}
"""Limits by tenant. A tenant with a limit belongs to one test, and the limits refill too slowly to matter in it."""
SLOTS = 4
QUEUE = 24
SHARE = 18
"""Places in the queue for a tenant who is alone in it."""


class Keyed(NamedTuple):
    """A server with tenants.

    Attributes:
        keys: tenant → API key.
    """

    server: Server
    keys: dict[str, str]

    def client(self, tenant: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.server.api, api_key=self.keys[tenant], max_retries=0, timeout=60)

    def usage(self, tenant: str, of: str = "") -> Any:
        query = f"?tenant={of}" if of else ""
        return self.server.get(f"/v1/usage{query}", Authorization=f"Bearer {self.keys[tenant]}")


@pytest.fixture(scope="module")
def keyed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("shares")
    adapters_folder = write_adapters(folder / "adapters", "one")
    path = folder / "keys.json"
    keys_by_tenant = {name: str(change_tenant(path, name, limits=limits).key) for name, limits in LIMITS.items()}
    keys_by_tenant["root"] = str(change_tenant(path, "root", admin=True).key)
    settings = (
        "model=pocket",
        "method=lora",
        "stage.keys=keys.json",
        f"stage.slots={SLOTS}",
        "stage.prefix_cache_mb=0",
        f"stage.queue={QUEUE}",
    )
    with run_serve_stage(forks, folder, *settings, f"stage.adapters={{one: {adapters_folder / 'one'}}}") as server:
        yield Keyed(server, keys_by_tenant)


def build_request(**more: Any) -> Any:
    return {"model": "one", "messages": HELLO, "max_tokens": 4, **more}


def get_rate_limit_error(client: openai.OpenAI, body: Any) -> openai.RateLimitError:
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**body)
    return raised.value


def test_who_has_nothing_left_is_refused_before_the_prompt_is_read(keyed: Keyed):
    """A prompt longer than the context raises another error once it is read."""
    eve, kim, bob = (keyed.client(name) for name in ("eve", "kim", "bob"))
    with pytest.raises(openai.BadRequestError, match="The context is"):
        eve.chat.completions.create(**build_request(messages=LONG))
    assert get_rate_limit_error(eve, build_request(messages=LONG)).param == "requests_per_minute"
    with pytest.raises(openai.BadRequestError, match="The context is"):
        kim.chat.completions.create(**build_request(messages=LONG))
    kim.completions.create(model="pocket", prompt=[[20] * 30], max_tokens=270, extra_body={"ignore_eos": True})
    # The debt of 240 tokens takes four minutes.
    assert get_rate_limit_error(kim, build_request(messages=LONG)).param == "tokens_per_minute"
    bob.completions.create(model="pocket", prompt=[[20] * 10], max_tokens=60, extra_body={"ignore_eos": True})
    assert get_rate_limit_error(bob, build_request(messages=LONG)).code == "insufficient_quota"


def test_an_answer_without_max_tokens_takes_what_the_tenant_has_left(keyed: Keyed):
    body: Any = {"model": "one", "messages": HELLO, "extra_body": {"ignore_eos": True}}
    tim = keyed.client("tim")
    answer = tim.chat.completions.create(**body)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 60
    assert answer.choices[0].finish_reason == "length"
    assert get_rate_limit_error(tim, body).code == "insufficient_quota"
    lea = keyed.client("lea")
    answers = lea.chat.completions.create(**body, n=2)
    assert answers.usage is not None
    assert 118 <= answers.usage.total_tokens <= 120
    # A given limit is never reduced.
    assert get_rate_limit_error(lea, {**body, "max_tokens": 100}).param == "tokens_per_minute"


def test_who_would_have_to_wait_where_nobody_may_is_refused_before_the_prompt_is_read(keyed: Keyed):
    body = {"model": "one", "prompt": [[20]] * SLOTS, "max_tokens": 1000, "ignore_eos": True}
    connections = [send_request(keyed.server, keyed.keys["dan"], body)]
    assert becomes_true(lambda: count_requests(keyed) == (SLOTS, 0))
    connections += [
        send_request(keyed.server, keyed.keys["dan"], {**body, "prompt": [[20]] * 6}) for _ in range(SHARE // 6)
    ]
    assert becomes_true(lambda: count_requests(keyed) == (SLOTS, SHARE))
    usage_before = keyed.usage("dan")[1]
    assert get_rate_limit_error(keyed.client("dan"), build_request(messages=LONG)).code == "queue_full"
    assert keyed.usage("dan")[1] == usage_before
    with pytest.raises(openai.BadRequestError, match="The context is"):
        keyed.client("ann").chat.completions.create(**build_request(messages=LONG))  # there is room for another tenant
    for connection in connections:
        connection.close()
    assert becomes_true(lambda: count_requests(keyed) == (0, 0))


def test_concurrency_counts_answers(keyed: Keyed):
    sue = keyed.client("sue")
    with pytest.raises(openai.BadRequestError) as raised:
        sue.chat.completions.create(**build_request(n=4))
    assert raised.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="4 answers at once"):
        sue.completions.create(model="one", prompt=["a", "b"], n=2, max_tokens=1)
    body = build_request(n=2, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    with sue.chat.completions.create(**body) as stream:
        next(stream)
        assert get_rate_limit_error(sue, build_request(n=2)).param == "concurrency"
        assert sue.chat.completions.create(**build_request()).choices
        assert keyed.usage("sue")[1]["remaining"]["concurrency"] == 1
    assert becomes_true(lambda: keyed.usage("sue")[1]["remaining"]["concurrency"] == 3)


def test_a_tenant_is_told_how_it_stands(keyed: Keyed):
    max_client = keyed.client("max")
    max_client.chat.completions.create(**build_request(max_tokens=100, extra_body={"ignore_eos": True}))
    headers = get_rate_limit_error(max_client, build_request()).response.headers
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-limit-requests"]) == ("30", "50")
    assert 49 <= int(headers["x-ratelimit-remaining-requests"]) <= 50  # it refills while a slow machine works
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert int(headers["retry-after"]) > 60
    assert int(headers["x-ratelimit-remaining-tokens"]) == 0
    free = keyed.client("ann").chat.completions.with_raw_response.create(**build_request(stream=True))
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_usage_is_for_its_own_tenant_and_for_admins(keyed: Keyed):
    dan = keyed.client("dan")
    before = keyed.usage("dan")[1]
    usage = dan.chat.completions.create(**build_request()).usage
    assert usage is not None
    status, after = keyed.usage("dan")
    growth = {name: after[name] - before[name] for name in ("requests", "prompt_tokens", "completion_tokens")}
    assert growth == {
        "requests": 1,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    assert (status, after["tenant"], after["reserved_tokens"]) == (200, "dan", 0)
    assert after["remaining"] == dict.fromkeys(after["limits"])
    assert keyed.usage("root", of="dan") == (200, after)
    assert keyed.usage("dan", of="dan") == (200, after)
    assert keyed.usage("root", of="bob")[1]["limits"]["token_budget"] == 70
    assert (keyed.usage("dan", of="root")[0], keyed.usage("dan", of="nobody")[0]) == (403, 403)
    assert keyed.usage("root", of="nobody")[0] == 404
    assert keyed.server.get("/v1/usage")[0] == 401


def send_request(server: Server, key: str, body: Any) -> socket.socket:
    """Send a request without waiting for its answer."""
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(
        f"{head}Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload
    )
    return connection


def count_requests(keyed: Keyed) -> tuple[float, ...]:
    """Return the number of answers in progress and of those waiting."""
    admin = {"Authorization": f"Bearer {keyed.keys['root']}"}
    return tuple(keyed.server.stat(f"align_requests_{name}", **admin) for name in ("running", "waiting"))


def test_a_server_that_ends_waits_for_no_refusal_that_it_holds(forks: Forks, tmp_path: Path):
    key = str(change_tenant(tmp_path / "keys.json", "eve", limits={"requests_per_minute": 1}).key)
    with run_serve_stage(forks, tmp_path, "model=pocket", "stage.keys=keys.json") as server:
        body = {"model": "pocket", "prompt": [[20]], "max_tokens": 1}
        connections = [send_request(server, key, body) for _ in range(REFUSAL_BURST + 30)]  # 3 seconds of refusals
        assert server.get("/health")[0] == 200  # connections are accepted in order, so all of these were accepted
        assert becomes_true(lambda: sum(line["status"] == 429 for line in server.log) >= REFUSAL_BURST - 1)
        assert sum(line["status"] == 429 for line in server.log) < REFUSAL_BURST + 15  # the others wait
        began = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        answers = [connection.recv(1000) for connection in connections]
        assert time.monotonic() - began < 2
        assert server.child.wait().status == 0
    assert sum(b" 429 " in answer.splitlines()[0] for answer in answers) == REFUSAL_BURST + 29


def test_a_request_that_only_waited_counts_nothing(keyed: Keyed):
    assert becomes_true(lambda: count_requests(keyed) == (0, 0))
    body = {"model": "one", "prompt": [[20]] * SLOTS, "max_tokens": 1000, "ignore_eos": True}
    busy = send_request(keyed.server, keyed.keys["root"], body)
    assert becomes_true(lambda: count_requests(keyed) == (SLOTS, 0))
    usage_before = keyed.usage("ann")[1]
    queued = send_request(keyed.server, keyed.keys["ann"], {"model": "one", "prompt": [[20] * 100], "max_tokens": 5})
    assert becomes_true(lambda: count_requests(keyed) == (SLOTS, 1))
    queued.close()
    assert becomes_true(lambda: keyed.usage("ann")[1]["requests"] == usage_before["requests"] + 1)
    usage_after = keyed.usage("ann")[1]
    assert (usage_after["total_tokens"], usage_after["reserved_tokens"]) == (usage_before["total_tokens"], 0)
    busy.close()


def test_a_prompt_counts_from_where_it_is_read(keyed: Keyed):
    """A client who leaves before the first answer pays for the prompts that were read: four of its sixteen are read at
    once."""
    assert becomes_true(lambda: count_requests(keyed) == (0, 0))
    usage_before = keyed.usage("ann")[1]
    prompts = [[20 + i] * 1000 for i in range(16)]
    connection = send_request(keyed.server, keyed.keys["ann"], {"model": "one", "prompt": prompts, "max_tokens": 20})
    assert becomes_true(lambda: count_requests(keyed)[0] == SLOTS)
    connection.close()
    assert becomes_true(lambda: keyed.usage("ann")[1]["requests"] == usage_before["requests"] + 1)
    usage_after = keyed.usage("ann")[1]
    prompts_read, remainder = divmod(usage_after["prompt_tokens"] - usage_before["prompt_tokens"], 1000)
    assert (remainder, usage_after["reserved_tokens"]) == (0, 0)
    assert 1 <= prompts_read <= 2 * SLOTS
    assert becomes_true(lambda: keyed.server.log[-1]["prompt_tokens"] == prompts_read * 1000)
