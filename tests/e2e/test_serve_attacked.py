"""Regression tests of attacks from outside: bodies that are slow to refuse, signals, folders that change."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Forks
from serving import Server, run_serve_stage, write_adapters


@pytest.fixture(scope="module")
def server(adapter_server: Server) -> Server:
    return adapter_server


WRONG: dict[str, tuple[str, Any]] = {
    "prompts that are objects": ("/v1/completions", {"prompt": [{}] * 150_000}),
    "messages that are numbers": ("/v1/chat/completions", {"messages": [1] * 150_000}),
    "conversations of nothing": ("/v1/rewards", {"messages": [[{}]] * 120_000}),
    "parts that are numbers": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [1] * 150_000}]}),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_body_of_many_mistakes_is_refused_at_the_first(server: Server, what: str):
    path, body = WRONG[what]
    began = time.monotonic()
    status, answer = server.post(path, {"model": "pocket", **body})
    assert time.monotonic() - began < 2  # it took 4 to 12 seconds, during which no other request was answered
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("changes", [{"lora_alpha": "x"}, {"rank_pattern": {"(": 3}, "alpha_pattern": {"[": 1}}])
def test_a_configuration_of_nonsense_is_the_clients_mistake(server: Server, changes: dict[str, Any]):
    root = server.folder.parents[2] / "adapters"
    shutil.copytree(root / "two", root / "odd", dirs_exist_ok=True)
    config = json.loads((root / "two" / "adapter_config.json").read_text())
    (root / "odd" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    status, answer = server.post("/v1/load_lora_adapter", {"lora_name": "odd", "lora_path": "odd"})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert "'odd' was not loaded" in answer["error"]["message"]


def test_a_body_that_is_not_said_to_be_json_is_refused(server: Server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/completions", '{"model": "one"}', {"Content-Type": "text/plain"})
    answer = connection.getresponse()
    assert answer.status == 400
    assert "Content-Type: application/json" in json.loads(answer.read())["error"]["message"]


def test_an_interrupt_ends_streams_with_an_event_and_no_traceback(forks: Forks, tmp_path: Path):
    adapters_folder = write_adapters(tmp_path / "adapters", "one", "two")
    names = f"stage.adapters={{one: {adapters_folder / 'one'}}}"
    with run_serve_stage(forks, tmp_path, "model=pocket", "method=lora", names) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"model": "one", "prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        stream = connection.getresponse()
        assert stream.readline().startswith(b"data: ")
        server.child.send_signal(signal.SIGINT)
        events = [json.loads(line[6:]) for line in stream.read().splitlines() if line.startswith(b"data: {")]
        assert events[-1]["error"]["code"] == "shutting_down"
        exited = server.child.wait(30)
        assert exited.status == 0
        assert "Traceback" not in exited.out
        assert server.log[-1]["status"] == 503
        port = server.port
    # A restart with another adapter under the same run name uses the same folder and continues its log.
    names = f"stage.adapters={{one: {adapters_folder / 'two'}, more: base}}"
    with run_serve_stage(forks, tmp_path, "model=pocket", "method=lora", names, port=port) as server:
        before = server.log
        assert server.post("/v1/completions", {"model": "one", "prompt": "a", "max_tokens": 1})[0] == 200
        assert len(before) == 1
        assert server.get("/v1/models")[1]["data"][1]["adapter"] != before[0]["adapter"]
