"""A server in operation: its keys, logs and console messages, and how it reacts to changes of its files."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import Forks
from safetensors.torch import load_file, save_file
from serving import Server, run_serve_stage, write_adapters
from waiting import becomes_true

from align.serve.tenants import change_tenant, hash_key


class Run(NamedTuple):
    """A running server with tenants.

    Attributes:
        folder: the working directory that the server was started in.
        keys: tenant → API key.
    """

    server: Server
    folder: Path
    keys: dict[str, str]

    def bearer(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    def post(self, tenant: str, path: str, **body: Any) -> tuple[int, Any]:
        return self.server.post(f"/v1/{path}", body, **self.bearer(tenant))

    def count_used_tokens(self, tenant: str) -> int:
        """Return the tokens counted for a tenant so far."""
        return self.server.get("/v1/usage", **self.bearer(tenant))[1]["total_tokens"]


@pytest.fixture(scope="module")
def run(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with start_server(forks, tmp_path_factory.mktemp("operated")) as run:
        yield run


@contextmanager
def start_server(forks: Forks, folder: Path) -> Iterator[Run]:
    adapters_folder = write_adapters(folder / "adapters", "one", "two")
    file = folder / "keys.json"
    keys = {
        "ann": change_tenant(file, "ann").key,
        "root": change_tenant(file, "root", admin=True).key,
        "ben": change_tenant(file, "ben", allow=["on", "one", "later", "zebra"]).key,
        "tim": change_tenant(file, "tim", limits={"token_budget": 5}).key,
    }
    settings = ("model=pocket", "method=lora", f"stage.roots=[{adapters_folder}]", "stage.keys=keys.json")
    with run_serve_stage(forks, folder, *settings, f"stage.adapters={{one: {adapters_folder / 'one'}}}") as server:
        yield Run(server, folder, {name: str(key) for name, key in keys.items()})


def test_nobody_comes_in_without_a_key(run: Run):
    body = {"model": "one", "prompt": "a", "max_tokens": 1}
    for wrong in ("al-" + "a" * 43, "x", "al-"):
        assert run.server.post("/v1/completions", body, Authorization=f"Bearer {wrong}")[0] == 401
    for path in ("/v1/models", "/v1/nothing", "/metrics", "/openapi.json"):
        status, answer = run.server.get(path)
        assert (status, answer["error"]["code"]) == (401, "missing_api_key")
    for path in ("/", "/health", "/ready"):
        assert run.server.get(path)[0] == 200
    assert run.server.get("/metrics", **run.bearer("ann"))[0] == 403
    assert run.server.get("/metrics", **run.bearer("root"))[0] == 200


def test_a_tenant_sees_and_gets_its_own_models(run: Run):
    _, models = run.server.get("/v1/models", **run.bearer("ben"))
    assert [model["id"] for model in models["data"]] == ["one"]
    assert run.post("ben", "completions", model="one", prompt="a", max_tokens=1)[0] == 200
    messages = set()
    for model in ("pocket", "three"):
        status, answer = run.post("ben", "completions", model=model, prompt="a", max_tokens=1)
        assert status == 404
        messages.add(answer["error"]["message"].replace(model, "…"))
    assert len(messages) == 1


def test_no_key_and_no_prompt_is_written_down(run: Run):
    run.post("ann", "completions", model="one", prompt="Hello, how are you?", max_tokens=1)
    metrics = run.server.get("/metrics", **run.bearer("root"))[1]
    status, error = run.post("ann", "completions", model=run.keys["ben"], prompt="a")
    assert status == 404
    texts = [path.read_text(errors="replace") for path in (run.folder / "runs").rglob("*") if path.is_file()]
    for text in (*texts, metrics, str(error)):
        assert "Hello, how" not in text
        assert not any(key in text for key in run.keys.values())
    assert str(run.folder) not in metrics + str(error)
    assert '"tenant": "ann"' in "".join(texts)


def test_a_key_that_is_revoked_ends_what_is_under_way_with_it(run: Run):
    second = str(change_tenant(run.folder / "keys.json", "ann").key)
    run.keys["ann again"] = second
    body = {"model": "one", "prompt": "a", "stream": True, "ignore_eos": True}
    streams: dict[str, tuple[str, float]] = {}

    def read(tenant: str, tokens: int) -> None:
        streams[tenant] = run.post(tenant, "completions", **body, max_tokens=tokens)[1], time.monotonic()

    requests = {"ann": 1000, "ann again": 400}
    threads = [threading.Thread(target=read, args=each) for each in requests.items()]
    for thread in threads:
        thread.start()
    assert becomes_true(lambda: run.server.stat("align_requests_running", **run.bearer("root")) == 2)
    revoked_at = time.monotonic()
    change_tenant(run.folder / "keys.json", "ann", revoke=hash_key(run.keys["ann"])[:8])
    for thread in threads:
        thread.join()
    text, ended_at = streams["ann"]
    assert ended_at - revoked_at < 1
    assert json.loads(text.strip().splitlines()[-1][6:])["error"]["code"] == "invalid_api_key"
    assert streams["ann again"][0].endswith("data: [DONE]\n\n")
    run.keys["ann"] = second


def test_the_log_of_a_refused_load_names_what_was_asked(run: Run):
    assert run.post("root", "load_lora_adapter", lora_name="far", lora_path="nowhere")[0] == 400
    assert run.post("root", "unload_lora_adapter", lora_name="nobody")[0] == 404
    assert run.post("ann", "load_lora_adapter", lora_name="mine", lora_path="one")[0] == 403
    assert becomes_true(lambda: run.server.log[-1]["status"] == 403)
    assert [(line["asked"], line["status"]) for line in run.server.log[-3:]] == [
        ("far", 400),
        ("nobody", 404),
        ("", 403),
    ]


def test_weights_that_overflow_in_use_are_named(run: Run):
    shutil.copytree(run.folder / "adapters" / "two", run.folder / "adapters" / "huge")
    path = run.folder / "adapters" / "huge" / "adapter_model.safetensors"
    save_file({key: torch.full_like(tensor, 3e37) for key, tensor in load_file(path).items()}, path)
    assert run.post("root", "load_lora_adapter", lora_name="huge", lora_path="huge")[0] == 200
    tokens_before = run.count_used_tokens("ann")
    status, answer = run.post("ann", "completions", model="huge", prompt="a", max_tokens=2)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (422, "model_not_finite", "model")
    assert "'huge' computed values that are nan or infinite" in answer["error"]["message"]
    status, text = run.post("ann", "completions", model="huge", prompt="a", max_tokens=2, stream=True)
    assert (status, json.loads(text.strip().splitlines()[-1][6:])) == (200, answer)
    assert becomes_true(lambda: run.server.log[-1]["status"] == 422)
    line = run.server.log[-1]
    assert line["prompt_tokens"] == 0  # the tenant is not charged for it
    assert run.count_used_tokens("ann") == tokens_before
    log = (run.server.folder / "log.txt").read_text()
    assert f"{line['id']} failed on huge ({line['adapter'][:12]}): the logits are nan or infinite" in log


def test_targets_that_are_not_those_of_the_tensors_are_refused(run: Run):
    folder = shutil.copytree(run.folder / "adapters" / "one", run.folder / "adapters" / "narrow")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    status, answer = run.post("root", "load_lora_adapter", lora_name="narrow", lora_path="narrow")
    assert (status, answer["error"]["param"]) == (400, "target_modules")
    assert "leaves out model.layers.0.mlp.down_proj, " in answer["error"]["message"]


def test_what_an_operator_has_to_know_is_on_the_console(forks: Forks, tmp_path: Path):
    with start_server(forks, tmp_path) as run:
        for _ in range(2):
            assert run.post("tim", "completions", model="one", prompt="a", max_tokens=10)[0] == 429
        assert run.post("root", "load_lora_adapter", lora_name="later", lora_path="two")[0] == 200
        assert becomes_true(lambda: run.server.log[-1]["asked"] == "later")
        digest = run.server.log[-1]["adapter"][:12]
        assert run.post("root", "unload_lora_adapter", lora_name="later")[0] == 200
        change_tenant(run.folder / "keys.json", "ben", allow=["one", "pockett"])
        assert becomes_true(lambda: "pockett" in (run.server.folder / "log.txt").read_text())
        (run.folder / "keys.json").chmod(0o644)
        for _ in range(3):
            assert run.post("ann", "completions", model="one", prompt="a", max_tokens=1)[0] == 503
        (run.folder / "keys.json").chmod(0o600)
        assert becomes_true(lambda: run.post("ann", "completions", model="one", prompt="a", max_tokens=1)[0] == 200)
        run.server.child.send_signal(signal.SIGTERM)
        stderr = run.server.child.wait().err
        lines = stderr.splitlines()
        assert lines == [
            "tenant ben may ask for models that are not served: later, on (did you mean one?), zebra",
            "tenant tim has 5 of its 5 tokens left: a request was refused",
            f"root loaded later ({digest})",
            f"root unloaded later ({digest})",
            "tenant ben may ask for models that are not served: pockett (did you mean pocket?)",
            "the key file others than its owner may read or write it; all requests are refused",
            "the key file can be read again",
        ]
        log = (run.server.folder / "log.txt").read_text()
        assert all(line in log for line in lines)
        assert not any(key in stderr + log for key in run.keys.values())


DIES = """
from align.rollout.serving_engine import EngineThread

def dies(self):
    with self._changed:
        while not self._has_work:
            self._changed.wait()

EngineThread._run = dies
"""


def test_an_engine_that_died_is_told_to_clients_and_to_the_operator(forks: Forks, tmp_path: Path):
    with run_serve_stage(forks, tmp_path, "model=pocket", before=DIES) as server:
        began = time.monotonic()
        status, answer = server.post("/v1/completions", {"model": "pocket", "prompt": "a", "stream": False})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert time.monotonic() - began < 3
        exited = server.child.wait()  # so that a supervisor can restart it
    first, last = exited.err.splitlines()
    assert first == "the engine has stopped: no request is answered any more"
    assert last.startswith("align: the engine ended unexpectedly.")
    assert exited.status != 0
