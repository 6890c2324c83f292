"""Requests that Schemathesis derives from `/openapi.json`, valid and invalid, meet no fault of the server."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from deploy_files import find_program
from processes import Forks
from serving import run_serve_stage, write_adapters

HOOKS = """
import schemathesis

@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "one" if len(body["model"]) % 2 else "pocket"
    if body.get("prompt", 0) in ("", []):
        body["prompt"] = "Hello"
    for message in body["messages"] if isinstance(body.get("messages"), list) else ():
        if isinstance(message, dict) and not message.get("content"):
            message["content"] = "Hello"
"""
"""Set known model names and nonempty texts. Schemathesis tries the simplest requests first, without either, and those
are refused before anything else is checked."""
POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/rewards", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@pytest.mark.slow
def test_whatever_the_schema_allows_and_does_not(forks: Forks, tmp_path: Path) -> None:
    if (command := find_program("schemathesis")) is None:
        pytest.skip("schemathesis is not installed (of the dev extra)")
    adapters_folder = write_adapters(tmp_path / "adapters", "one")
    (tmp_path / "hooks.py").write_text(HOOKS)
    env = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
    words = ("model=pocket", "method=lora", "stage.max_length=64", f"stage.adapters={{one: {adapters_folder / 'one'}}}")
    with run_serve_stage(forks, tmp_path, *words, f"stage.roots=[{adapters_folder}]") as server:
        arguments = [command, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error", "--seed", "1"]
        arguments += ["--max-examples", "10", "--warnings", "off"]
        process = subprocess.run(arguments, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert process.returncode == 0, process.stdout[-5000:]
        counts = Counter((line["path"], line["status"]) for line in server.log)
        assert all(status < 500 for _, status in counts)
        assert {path for path, _ in counts} >= set(POSTS)
        assert min(counts[path, 200] for path in POSTS[:2]) >= 10  # these requests were answered
        assert server.get("/ready")[0] == 200
        assert "Traceback" not in (server.folder / "log.txt").read_text()
