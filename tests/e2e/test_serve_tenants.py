"""Stop a server: SIGTERM lets answers finish, and what was sent before SIGKILL is counted."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
from processes import Forks
from serving import run_serve_stage
from waiting import becomes_true

from align.serve.tenants import change_tenant


@pytest.mark.parametrize(("drain_s", "ends"), [("30", "[DONE]"), ("0.2", "shutting down")])
def test_sigterm_lets_what_is_under_way_finish(forks: Forks, tmp_path: Path, drain_s: str, ends: str):
    streams = []
    with run_serve_stage(forks, tmp_path, "model=pocket", f"stage.drain_s={drain_s}") as server:
        body = {"model": "pocket", "prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True}
        thread = threading.Thread(target=lambda: streams.append(server.post("/v1/completions", body)[1]))
        thread.start()
        assert becomes_true(lambda: server.stat("align_requests_running") == 1)
        server.child.send_signal(signal.SIGTERM)
        if drain_s == "30":
            assert becomes_true(lambda: server.get("/ready")[0] == 503)
            assert server.get("/health")[0] == 200
            assert server.post("/v1/completions", {**body, "stream": False})[0] == 503
        thread.join(60)
        exited = server.child.wait(60)
    assert ends in streams[0]
    assert (streams[0].count('"text"') > 250) == (drain_s == "30")
    assert (exited.status, "fault" in exited.err) == (0, False), exited
    assert next(line for line in server.log if line["stream"])["status"] == (200 if drain_s == "30" else 503)


def test_what_a_client_received_is_counted_when_the_server_is_killed(forks: Forks, tmp_path: Path):
    key = str(change_tenant(tmp_path / "keys.json", "ann", limits={"token_budget": 100_000}).key)
    with run_serve_stage(forks, tmp_path, "model=pocket", "stage.keys=keys.json") as server:
        client = openai.OpenAI(base_url=server.api, api_key=key, max_retries=0)
        request: Any = {
            "model": "pocket",
            "prompt": [[10, 20, 30]],
            "max_tokens": 900,
            "extra_body": {"ignore_eos": True},
        }
        received: list[Any] = []

        def read() -> None:
            for chunk in client.completions.create(**request, stream=True):
                received.append(chunk)
                if len(received) == 30:
                    server.child.send_signal(signal.SIGKILL)

        with pytest.raises(openai.APIConnectionError):
            read()
        server.child.wait()
    stdout = forks.run(tmp_path, "stage=serve", "stage.action=tenants", "stage.keys=keys.json").out
    requests, tokens, _, _ = stdout.splitlines()[-1].split()[-4:]
    assert requests == "1", stdout
    assert len(received) <= int(tokens) - 3 < 900
