"""Answers that follow a schema, and forced tool calls, through OpenAI's own client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field
from serving import ASKED, Server

HELLO: list[Any] = [{"role": "user", "content": "Hello, how are you?"}]


class Line(BaseModel):
    text: str
    mood: Literal["glad", "sad"] | None


class Talk(BaseModel):
    title: str = Field(max_length=40)
    stars: int
    lines: list[Line] = Field(min_length=1)


@pytest.fixture(scope="module")
def server(adapter_server: Server) -> Server:
    return adapter_server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.api, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_pydantic_model_is_parsed_and_a_stream_says_the_same(client: openai.OpenAI):
    request: Any = {"model": "pocket", "messages": HELLO, "max_tokens": 300, "seed": 3}
    completion = client.chat.completions.parse(**request, response_format=Talk, n=3)
    for choice in completion.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Talk)
    with client.chat.completions.stream(**request, response_format=Talk) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.content == completion.choices[0].message.content


def test_a_completion_follows_a_schema_too(client: openai.OpenAI):
    completion = client.completions.create(
        model="pocket", prompt="It is", max_tokens=40, extra_body={"structured_outputs": {"json": {"type": "boolean"}}}
    )
    assert completion.choices[0].text in ("true", "false")
    assert completion.choices[0].finish_reason == "stop"


WEATHER = {
    "type": "object",
    "properties": {"in": {"enum": ["Oslo", "Rome"]}},
    "required": ["in"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "rain", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "noon", "parameters": {"type": "object"}}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "rain"}}])
def test_a_call_is_forced(choice: Any, client: openai.OpenAI):
    request: Any = {"model": "tools", "messages": ASKED, "tools": TOOLS, "temperature": 2, "seed": 2, "max_tokens": 200}
    completion = client.chat.completions.create(**request, tool_choice=choice, n=4)
    for answer in completion.choices:
        assert answer.finish_reason == "tool_calls"
        assert not answer.message.content
        (call,) = answer.message.tool_calls or []
        assert call.type == "function"
        if call.function.name == "rain":
            jsonschema.validate(json.loads(call.function.arguments), WEATHER)
        else:
            assert (call.function.name, choice) == ("noon", "required")
    chunks = client.chat.completions.create(**request, tool_choice=choice, stream=True)
    calls = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or []]
    first = (completion.choices[0].message.tool_calls or [])[0]
    assert [(c.function.name, c.function.arguments) for c in calls if c.function] == [
        (first.function.name, first.function.arguments)  # type: ignore[union-attr]
    ]


def test_a_bad_schema_is_refused_at_once_and_holds_nobody_up(client: openai.OpenAI, server: Server):
    def get_refusal(schema: Any) -> str:
        response_format: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="pocket", messages=HELLO, response_format=response_format)
        assert error.value.param == "response_format.json_schema.schema"
        return str(error.value)

    assert "uniqueItems" in get_refusal({"type": "array", "uniqueItems": True})
    deep: Any = {}
    for _ in range(300):
        deep = {"items": deep}
    assert "levels" in get_refusal(deep)
    slow_schema = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i % 26)}.{{{i}}}$"} for i in range(40)]}
    with ThreadPoolExecutor(1) as pool:
        refusal = pool.submit(get_refusal, slow_schema)
        began = time.monotonic()
        health_checks = 0
        while not refusal.done():
            assert server.get("/health")[0] == 200
            health_checks += 1
        assert "too long" in refusal.result()
        assert health_checks > 5
        assert time.monotonic() - began < 10
    assert client.chat.completions.create(model="pocket", messages=HELLO, max_tokens=2).choices
