"""A server that answers with vLLM, for which a stand-in in NumPy runs: names, weights, log and errors are those of
align's own engine."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from free_ports import pick_free_port
from processes import Forks
from serving import Server, run_serve_stage, write_adapters
from vllm_stand_in import stand_in_python
from waiting import becomes_true

from align.models.adapters import attach_adapter
from align.models.base import find_base
from align.models.load import load_base
from align.run.weights import adapter_digest

HELLO: Any = [{"role": "user", "content": "Hello there"}]
ENUM = {"type": "object", "properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"], "additionalProperties": False}
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": ENUM}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    write_adapters(folder / "adapters", "one", "two", "three")
    stand_in_python(folder / "venv")
    return folder


def build_settings(home: Path, *names: str, **more: str) -> list[str]:
    adapter_paths = ", ".join(f"{name}: {home / 'adapters' / name}" for name in names)
    return [
        "model=pocket",
        "serve=vllm",
        f"serve.python={home / 'venv' / 'bin' / 'python'}",
        "serve.dtype=float32",
        "stage.max_length=256",
        f"stage.adapters={{{adapter_paths}}}",
        f"stage.roots=[{home / 'adapters'}]",
    ]


@pytest.fixture(scope="module")
def server(forks: Forks, home: Path) -> Iterator[Server]:
    with run_serve_stage(forks, home, *build_settings(home, "one", "two")) as server:
        yield server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.api, api_key="none", max_retries=0)


@torch.no_grad()
def test_each_name_is_answered_by_its_weights(server: Server, home: Path):
    model = load_base(find_base("pocket"), "lora", torch.device("cpu"), torch.float32)
    ids = [1, 300, 301, 40, 41, 42]
    expected = {}
    for name in ("pocket", "one", "two"):
        if name != "pocket":
            model = attach_adapter(model, home / "adapters" / name, name)
            model.set_adapter(name)
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected[name] = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    for name, logprobs in expected.items():
        assert server.logprobs(name, ids) == pytest.approx(logprobs, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(expected["one"], expected["two"], strict=True)) > 0.1


def test_an_answer_says_which_weights_made_it_and_so_does_the_log(client: openai.OpenAI, server: Server, home: Path):
    digest = adapter_digest(home / "adapters" / "one")
    raw = client.chat.completions.with_raw_response.create(
        model="one", messages=HELLO, max_tokens=5, user="u", extra_body={"ignore_eos": True}
    )
    assert raw.headers["x-align-adapter"] == digest
    assert raw.parse().usage.completion_tokens == 5  # pyright: ignore[reportOptionalMemberAccess]
    assert becomes_true(lambda: server.log[-1]["id"] == raw.headers["x-request-id"])
    assert server.log[-1]["adapter"] == digest
    assert server.log[-1]["completion_tokens"] == 5
    for unknown in ("nobody", "base", f"adapter-{digest}", f"one@sha256:{'0' * 12}", "pocket "):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=unknown, messages=HELLO, max_tokens=1)
    pinned = client.chat.completions.create(model=f"one@sha256:{digest[:12]}", messages=HELLO, max_tokens=1)
    assert pinned.model == "one"


def test_answers_follow_a_schema(client: openai.OpenAI):
    for seed in range(3):
        completion = client.chat.completions.create(
            model="one", messages=HELLO, max_tokens=60, seed=seed, response_format=SCHEMA
        )
        assert completion.choices[0].finish_reason == "stop"
        assert json.loads(completion.choices[0].message.content or "")["a"] in ("x", "yes")


def test_adapters_come_and_go(client: openai.OpenAI, server: Server, home: Path):
    def load(path: str, **more: Any) -> tuple[int, Any]:
        return server.post("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path, **more})

    def complete() -> str:
        response = client.chat.completions.with_raw_response.create(model="new", messages=HELLO, max_tokens=4)
        return response.headers["x-align-adapter"]

    assert load("three")[0] == 200
    assert complete() == adapter_digest(home / "adapters" / "three")
    with client.chat.completions.create(
        model="new", messages=HELLO, max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
        assert load("two", load_inplace=True)[0] == 200
        assert len(list(stream)) >= 50  # the stream continues with the weights that it started with
    assert complete() == adapter_digest(home / "adapters" / "two")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    with pytest.raises(openai.NotFoundError):
        complete()
    copies = home / "runs" / "serve" / "s" / "vllm"
    client.completions.create(model="one", prompt="x", max_tokens=1)
    digests = {adapter_digest(home / "adapters" / name) for name in ("one", "two")}
    assert becomes_true(lambda: {path.name for path in copies.iterdir()} == digests)


def find_vllm_pid(server: Server) -> int:
    """Return the process id of vLLM, the only child of the server."""
    [pid] = Path(f"/proc/{server.child.pid}/task/{server.child.pid}/children").read_text().split()
    return int(pid)


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_vllm_ends_with_the_server(forks: Forks, home: Path, tmp_path: Path, signum: int):
    with run_serve_stage(forks, tmp_path, *build_settings(home)) as server:
        pid = find_vllm_pid(server)
        assert is_running(pid)
        server.child.send_signal(signum)
        assert server.child.wait().status == (0 if signum == signal.SIGTERM else -signal.SIGKILL)
        assert becomes_true(lambda: not is_running(pid))


def test_a_server_ends_with_its_vllm_and_says_so(forks: Forks, home: Path, tmp_path: Path):
    with run_serve_stage(forks, tmp_path, *build_settings(home)) as server:
        os.kill(find_vllm_pid(server), signal.SIGKILL)
        exited = server.child.wait(30)
    assert exited.status != 0
    assert "the engine has stopped" in exited.err


def inject_fault(fault: str) -> str:
    """Return Python source that gives the stand-in a fault."""
    return f"import os; os.environ['STAND_IN'] = {fault!r}"


def test_a_wrong_vllm_never_opens(forks: Forks, home: Path, tmp_path: Path):
    """Other faults are tested in `test_vllm_engine`."""
    settings = ("stage=serve", f"stage.port={pick_free_port()}", *build_settings(home, "one"))
    exited = forks.start(tmp_path, *settings, before=inject_fault("not-applied")).wait(120)
    assert exited.status == 2
    assert "0% of the adapter's effect is in the engine's logprobs" in exited.err


def test_a_vllm_that_passes_over_grammars_is_found_out(forks: Forks, home: Path, tmp_path: Path):
    with run_serve_stage(forks, tmp_path, *build_settings(home), before=inject_fault("no-grammar")) as server:
        body = {"model": "pocket", "messages": HELLO, "max_tokens": 30, "response_format": SCHEMA}
        status, error = server.post("/v1/chat/completions", body)
        assert status == 500, error
        assert server.post("/v1/chat/completions", {**body, "response_format": {"type": "text"}})[0] == 200


def test_the_log_of_vllm_holds_no_prompt(server: Server, client: openai.OpenAI):
    client.completions.create(model="one", prompt="a secret of mine", max_tokens=2)
    for path in (server.folder / "vllm.log", server.folder / "log.txt", server.folder / "requests.jsonl"):
        assert "secret" not in path.read_text()
