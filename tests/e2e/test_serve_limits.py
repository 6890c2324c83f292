"""Limits of a request: excess is refused at once, with errors in the form that OpenAI's clients read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from processes import Forks
from serving import Server, run_serve_stage
from waiting import becomes_true

PROMPT = "Hello, how are you? " * 20


@pytest.fixture(scope="module")
def server(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("limited")
    settings = ("stage.max_prompts=4", "stage.max_logprobs=3000", "stage.max_answers=12")
    with run_serve_stage(forks, folder, "model=pocket", "method=lora", *settings) as server:
        yield server


def post_for_error(server: Server, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    status, answer = server.post(path, body)
    return status, answer.get("error", {})


def test_prompts_of_a_request_are_limited(server: Server):
    body = {"model": "pocket", "prompt": ["a"] * 5, "max_tokens": 1}
    status, error = post_for_error(server, "/v1/completions", body)
    assert (status, error["code"], error["param"]) == (400, "too_many_prompts", "prompt")
    assert "5 prompts, and may have 4 (stage.max_prompts)" in error["message"]
    assert server.post("/v1/completions", {**body, "prompt": ["a"] * 4})[0] == 200


def test_the_size_of_logprobs_is_known_before_they_are_computed(server: Server):
    tokens_before = server.stat("align_engine_prompt_tokens_total")
    echo = {"model": "pocket", "prompt": [PROMPT] * 4, "max_tokens": 0, "echo": True, "logprobs": 20}
    status, answer = post_for_error(server, "/v1/completions", echo)
    assert (status, answer["code"], answer["param"]) == (400, "too_many_logprobs", "logprobs")
    assert "an answer may have 3,000 (stage.max_logprobs)" in answer["message"]
    chat = {"model": "pocket", "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 20}
    status, answer = post_for_error(server, "/v1/chat/completions", {**chat, "max_tokens": 300})
    assert (status, answer["param"]) == (400, "top_logprobs")
    assert server.stat("align_engine_prompt_tokens_total") == tokens_before
    # Without max_tokens, an answer is as long as its logprobs allow.
    status, answer = server.post("/v1/chat/completions", {**chat, "ignore_eos": True, "seed": 1})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3000 // 21)


def test_answers_at_once_are_limited(server: Server):
    status, error = post_for_error(
        server, "/v1/completions", {"model": "pocket", "prompt": "a", "n": 13, "max_tokens": 1}
    )
    assert (status, error["param"]) == (400, "n")
    assert "your key may have 12 (stage.max_answers)" in error["message"]
    body = {"model": "pocket", "prompt": "a", "n": 4, "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: server.post("/v1/completions", body)[0], range(8)))
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 3


def test_a_wrong_field_is_named_as_clients_know_it(server: Server):
    request = {"model": "pocket", "prompt": "a", "max_tokens": 1}
    for stops, code in ((["a"] * 5, "array_above_max_length"), (["a" * 300], "string_above_max_length")):
        status, error = post_for_error(server, "/v1/completions", {**request, "stop": stops})
        assert (status, error["param"].split(".")[0], error["code"]) == (400, "stop", code)
        assert "constrained" not in json.dumps(error)
    assert post_for_error(server, "/v1/completions", {**request, "prompt": {}})[1]["param"] == "prompt"


def test_what_the_server_says_of_itself_has_its_errors(server: Server):
    _, spec = server.get("/openapi.json")
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            assert {"400", "401", "404", "429", "500", "503"} <= set(operation["responses"]), (method, path)
    assert "HTTPValidationError" not in json.dumps(spec["paths"])
    assert set(spec["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}


def test_loading_is_forbidden_where_no_folder_is_named(server: Server):
    status, error = post_for_error(server, "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a"})
    assert (status, error["code"]) == (403, "loading_disabled")
    assert "stage.roots" in error["message"]


def test_metrics_count_by_tenant(server: Server):
    server.post("/v1/completions", {"model": "pocket", "prompt": "a", "max_tokens": 2, "ignore_eos": True})
    assert becomes_true(lambda: server.log[-1]["completion_tokens"] == 2)
    tenant = server.log[-1]["tenant"]
    assert server.stat(f'align_tenant_completion_tokens_total{{tenant="{tenant}"}}') >= 2
    assert server.stat(f'align_tenant_requests_total{{status="200",tenant="{tenant}"}}') >= 1
    status, text = server.get("/metrics")
    assert status == 200
    for name in ("align_requests_total", "align_time_to_first_token_seconds_bucket", "align_completion_tokens_total"):
        assert f"{name}{{" in text
    assert 'model="pocket"' in text


HARD: dict[str, Any] = {
    "repeats of repeats": {"structured_outputs": {"regex": "^(.{1,1000}){1,1000}$"}},
    "the same in a schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": "string", "pattern": "^(.{1,1000}){1,1000}$"}},
        }
    },
    "ninety objects": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "a",
                "schema": {
                    "anyOf": [
                        {
                            "type": "object",
                            "properties": {f"k{i}": {"type": "string", "pattern": f"^(a|b){{{i},{i + 90}}}$"}},
                            "required": [f"k{i}"],
                        }
                        for i in range(90)
                    ]
                },
            },
        }
    },
}


@pytest.mark.parametrize("kind", HARD)
def test_a_grammar_that_costs_too_much_is_the_clients_mistake(server: Server, kind: str):
    body = {"model": "pocket", "messages": [{"role": "user", "content": "a"}], "max_tokens": 60, **HARD[kind]}
    for seed in range(4):
        status, answer = server.post("/v1/chat/completions", {**body, "seed": seed})
        assert status in (200, 400), answer
        if status == 400:
            assert answer["error"]["code"] == "invalid_grammar"
            assert answer["error"]["type"] == "invalid_request_error"
    if "repeats" in kind:
        assert status == 400
    assert server.post("/v1/completions", {"model": "pocket", "prompt": "a", "max_tokens": 2})[0] == 200
