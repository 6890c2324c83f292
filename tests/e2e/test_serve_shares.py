"""What a tenant may have of a server, asked before anything is computed for it; and what it is told of that."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from processes import Forks
from serving import Server, adapters, serving
from waiting import settles

from align.serve.rate_limits import REFUSAL_BURST
from align.serve.tenants import change_tenant

HELLO: list[Any] = [{"role": "user", "content": "Hello, how are you?"}]
LONG: list[Any] = [{"role": "user", "content": "word " * 5000}]
LIMITS: dict[str, dict[str, int | None]] = {
    "ann": {},
    "dan": {},
    "eve": {"requests_per_minute": 2},
    "kim": {"tokens_per_minute": 300},
    "lea": {"tokens_per_minute": 120, "requests_per_minute": 50},
    "sue": {"concurrency": 3},
    "tim": {"token_budget": 60},
    "bob": {"token_budget": 70},
}
SLOTS, QUEUE, SHARE = 4, 24, 18
"""`SHARE`: of the queue, for a tenant who is alone in it."""


class Keyed(NamedTuple):
    """Attributes:
    keys: of each tenant.
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
    made, keys = adapters(folder / "adapters", "one"), folder / "keys.json"
    found = {name: str(change_tenant(keys, name, limits=limits).key) for name, limits in LIMITS.items()}
    found["root"] = str(change_tenant(keys, "root", admin=True).key)
    words = (
        "model=pocket",
        "method=lora",
        "stage.keys=keys.json",
        f"stage.slots={SLOTS}",
        "stage.prefix_cache_mb=0",
        f"stage.queue={QUEUE}",
    )
    with serving(forks, folder, *words, f"stage.adapters={{one: {made / 'one'}}}") as server:
        yield Keyed(server, found)


def asked(**more: Any) -> Any:
    return {"model": "one", "messages": HELLO, "max_tokens": 4, **more}


def limited(client: openai.OpenAI, body: Any) -> openai.RateLimitError:
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(**body)
    return raised.value


def test_who_has_nothing_left_is_refused_before_the_prompt_is_read(keyed: Keyed):
    """A prompt that is longer than the context is told so by whoever reads it."""
    eve, kim, bob = (keyed.client(name) for name in ("eve", "kim", "bob"))
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match="The context is"):
            eve.chat.completions.create(**asked(messages=LONG))
    assert limited(eve, asked(messages=LONG)).param == "requests_per_minute"
    with pytest.raises(openai.BadRequestError, match="The context is"):
        kim.chat.completions.create(**asked(messages=LONG))
    kim.completions.create(model="pocket", prompt=[[20] * 30], max_tokens=270, extra_body={"ignore_eos": True})
    assert limited(kim, asked(messages=LONG, max_tokens=100)).param == "tokens_per_minute"
    bob.completions.create(model="pocket", prompt=[[20] * 10], max_tokens=60, extra_body={"ignore_eos": True})
    assert limited(bob, asked(messages=LONG)).code == "insufficient_quota"


def test_an_answer_without_max_tokens_takes_what_the_tenant_has_left(keyed: Keyed):
    body: Any = {"model": "one", "messages": HELLO, "extra_body": {"ignore_eos": True}}
    tim = keyed.client("tim")
    answer = tim.chat.completions.create(**body)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 60
    assert answer.choices[0].finish_reason == "length"
    assert limited(tim, body).code == "insufficient_quota"
    lea = keyed.client("lea")
    answers = lea.chat.completions.create(**body, n=2)
    assert answers.usage is not None
    assert 118 <= answers.usage.total_tokens <= 120
    assert limited(lea, {**body, "max_tokens": 100}).param == "tokens_per_minute"  # a given limit is never reduced


def test_who_would_have_to_wait_where_nobody_may_is_refused_before_the_prompt_is_read(keyed: Keyed):
    body = {"model": "one", "prompt": [[20]] * SLOTS, "max_tokens": 1000, "ignore_eos": True}
    sent = [post(keyed.server, keyed.keys["dan"], body)]
    assert settles(lambda: under_way(keyed) == (SLOTS, 0))
    sent += [post(keyed.server, keyed.keys["dan"], {**body, "prompt": [[20]] * 6}) for _ in range(SHARE // 6)]
    assert settles(lambda: under_way(keyed) == (SLOTS, SHARE))
    before = keyed.usage("dan")[1]
    assert limited(keyed.client("dan"), asked(messages=LONG)).code == "queue_full"
    assert keyed.usage("dan")[1] == before
    with pytest.raises(openai.BadRequestError, match="The context is"):
        keyed.client("ann").chat.completions.create(**asked(messages=LONG))  # there is room for another tenant
    for each in sent:
        each.close()
    assert settles(lambda: under_way(keyed) == (0, 0))


def test_concurrency_counts_answers(keyed: Keyed):
    sue = keyed.client("sue")
    with pytest.raises(openai.BadRequestError) as raised:
        sue.chat.completions.create(**asked(n=4))
    assert raised.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="4 answers at once"):
        sue.completions.create(model="one", prompt=["a", "b"], n=2, max_tokens=1)
    body = asked(n=2, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    with sue.chat.completions.create(**body) as stream:
        next(stream)
        assert limited(sue, asked(n=2)).param == "concurrency"
        assert sue.chat.completions.create(**asked()).choices
        assert keyed.usage("sue")[1]["remaining"]["concurrency"] == 1
    assert settles(lambda: keyed.usage("sue")[1]["remaining"]["concurrency"] == 3)


def test_a_tenant_is_told_how_it_stands(keyed: Keyed):
    lea = keyed.client("lea")
    with suppress(openai.RateLimitError):  # a full minute would let the next one pass
        lea.chat.completions.create(**asked(max_tokens=40))
    with pytest.raises(openai.APIStatusError) as raised:
        lea.chat.completions.create(**asked(max_tokens=900))
    headers = raised.value.response.headers
    assert raised.value.status_code == 429
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-limit-requests"]) == ("120", "50")
    assert 40 <= int(headers["x-ratelimit-remaining-requests"]) <= 50  # a slow machine refills it
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert int(headers["retry-after"]) >= 1
    assert int(headers["x-ratelimit-remaining-tokens"]) < 120
    free = keyed.client("ann").chat.completions.with_raw_response.create(**asked(stream=True))
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]


def test_usage_is_for_its_own_tenant_and_for_admins(keyed: Keyed):
    dan = keyed.client("dan")
    before = keyed.usage("dan")[1]
    usage = dan.chat.completions.create(**asked()).usage
    assert usage is not None
    status, after = keyed.usage("dan")
    grown = {name: after[name] - before[name] for name in ("requests", "prompt_tokens", "completion_tokens")}
    assert grown == {
        "requests": 1, "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
    }  # fmt: skip
    assert (status, after["tenant"], after["reserved_tokens"]) == (200, "dan", 0)
    assert after["remaining"] == dict.fromkeys(after["limits"])
    assert keyed.usage("root", of="dan") == (200, after)
    assert keyed.usage("dan", of="dan") == (200, after)
    assert keyed.usage("root", of="bob")[1]["limits"]["token_budget"] == 70
    assert (keyed.usage("dan", of="root")[0], keyed.usage("dan", of="nobody")[0]) == (403, 403)
    assert keyed.usage("root", of="nobody")[0] == 404
    assert keyed.server.get("/v1/usage")[0] == 401


def post(server: Server, key: str, body: Any) -> socket.socket:
    """A request whose answer nobody waits for."""
    sent = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
    return connection


def under_way(keyed: Keyed) -> tuple[float, ...]:
    """Answers that are being made, and those that wait."""
    admin = {"Authorization": f"Bearer {keyed.keys['root']}"}
    return tuple(keyed.server.stat(f"align_requests_{name}", **admin) for name in ("running", "waiting"))


def test_a_server_that_ends_waits_for_no_refusal_that_it_holds(forks: Forks, tmp_path: Path):
    key = str(change_tenant(tmp_path / "keys.json", "eve", limits={"requests_per_minute": 1}).key)
    with serving(forks, tmp_path, "model=pocket", "stage.keys=keys.json") as server:
        body = {"model": "pocket", "prompt": [[20]], "max_tokens": 1}
        held = [post(server, key, body) for _ in range(REFUSAL_BURST + 30)]  # 3 seconds of refusals
        assert server.get("/health")[0] == 200  # connections are taken in order, so that all of these have been
        assert settles(lambda: sum(line["status"] == 429 for line in server.log) >= REFUSAL_BURST - 1)
        assert sum(line["status"] == 429 for line in server.log) < REFUSAL_BURST + 15  # the others wait
        began = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        answers = [connection.recv(1000) for connection in held]
        assert time.monotonic() - began < 2
        assert server.child.ended().status == 0
    assert sum(b" 429 " in answer.splitlines()[0] for answer in answers) == REFUSAL_BURST + 29


def test_a_request_that_only_waited_counts_nothing(keyed: Keyed):
    assert settles(lambda: under_way(keyed) == (0, 0))
    long = {"model": "one", "prompt": [[20]] * SLOTS, "max_tokens": 1000, "ignore_eos": True}
    busy = post(keyed.server, keyed.keys["root"], long)
    assert settles(lambda: under_way(keyed) == (SLOTS, 0))
    before = keyed.usage("ann")[1]
    waits = post(keyed.server, keyed.keys["ann"], {"model": "one", "prompt": [[20] * 100], "max_tokens": 5})
    assert settles(lambda: under_way(keyed) == (SLOTS, 1))
    waits.close()
    assert settles(lambda: keyed.usage("ann")[1]["requests"] == before["requests"] + 1)
    after = keyed.usage("ann")[1]
    assert (after["total_tokens"], after["reserved_tokens"]) == (before["total_tokens"], 0)
    busy.close()


def test_a_prompt_counts_from_where_it_is_read(keyed: Keyed):
    """Sixteen prompts, four of which are read at once: who goes before the first answer pays for these."""
    assert settles(lambda: under_way(keyed) == (0, 0))
    before = keyed.usage("ann")[1]
    prompts = [[20 + i] * 1000 for i in range(16)]
    connection = post(keyed.server, keyed.keys["ann"], {"model": "one", "prompt": prompts, "max_tokens": 20})
    assert settles(lambda: under_way(keyed)[0] == SLOTS)
    connection.close()
    assert settles(lambda: keyed.usage("ann")[1]["requests"] == before["requests"] + 1)
    after = keyed.usage("ann")[1]
    read, rest = divmod(after["prompt_tokens"] - before["prompt_tokens"], 1000)
    assert (rest, after["reserved_tokens"]) == (0, 0)
    assert 1 <= read <= 2 * SLOTS
    assert settles(lambda: keyed.server.log[-1]["prompt_tokens"] == read * 1000)
