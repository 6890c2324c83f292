"""Random requests get an answer or a client error in OpenAI's shape, never a server error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Forks
from serving import Server, run_serve_stage

from align.serve.prompts import NOT_SUPPORTED, ChatBody, CompletionBody

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**63, -(2**63), 10**30, 0.5, 1e308, -0.0]),
    st.text(st.sampled_from("a \n<|end|>\0é😀\u202e"), max_size=12),
    st.sampled_from(["\ud800", "<|end|>", "pocket", "auto", "none", "<think>", "</think>"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
OTHERS = ("tool_calls", "reasoning_content", "name", "tool_call_id", "audio")
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": st.text(max_size=8) | VALUES}, optional=dict.fromkeys(OTHERS, VALUES)
    ),
    min_size=1,
    max_size=3,
)
FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *NOT_SUPPORTED} - {"model", "ignore_eos"})


@pytest.fixture(scope="module")
def server(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with run_serve_stage(forks, tmp_path_factory.mktemp("any"), "model=pocket", "stage.max_length=64") as server:
        yield server


def post_checked(server: Server, path: str, body: Any) -> int:
    status, answer = server.post(path, body)
    assert status == 200 or 400 <= status < 500, (status, answer, body)
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    return status


FEW = settings(max_examples=60)


def test_whatever_a_chat_asks_for(server: Server):
    statuses = set()

    @FEW
    @given(messages=MESSAGES, more=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
    def ask(messages: Any, more: dict[str, Any]) -> None:
        body = {"model": "pocket", "messages": messages, "max_tokens": 3, **more}
        statuses.add(post_checked(server, "/v1/chat/completions", body))

    ask()
    assert {200, 400} <= statuses


def test_whatever_is_to_be_gone_on_with(server: Server):
    statuses = set()
    prompts = st.one_of(VALUES, st.text(max_size=8), st.lists(st.integers(-1, 4096), max_size=5))

    @FEW
    @given(prompt=prompts, more=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
    def ask(prompt: Any, more: dict[str, Any]) -> None:
        body = {"model": "pocket", "prompt": prompt, "max_tokens": 2, "echo": True, "logprobs": 1, **more}
        statuses.add(post_checked(server, "/v1/completions", body))

    ask()
    assert {200, 400} <= statuses


@FEW
@given(body=st.one_of(VALUES, st.dictionaries(st.sampled_from(["model", "lora_name", "lora_path"]), VALUES)))
def test_whatever_body_comes_anywhere(server: Server, body: Any):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert post_checked(server, path, body) != 200


def test_the_server_saw_no_fault_of_its_own(server: Server):
    assert "Traceback" not in (server.folder / "log.txt").read_text()
