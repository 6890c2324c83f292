"""A server of `stage=serve` in a separate process, with small adapters on the built-in model."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from chat_templates import TOOL_TEMPLATE
from free_ports import pick_free_port
from peft import LoraConfig, get_peft_model
from processes import Child, Forks
from waiting import SOON_S

from align.data.chat.tools import encode_tool_prompt
from align.models.adapters import save_adapter
from align.models.base import find_base
from align.models.load import load_base, load_tokenizer
from align.run import write_json

ADAPTERS = TemporaryDirectory(prefix="align-adapters-")
CALL = '<tool_call>{"name": "rain", "arguments": {"in": "Oslo"}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
ASKED = [{"role": "user", "content": "Rain in Oslo?"}]


def write_adapters(root: Path, *names: str) -> Path:
    """Write adapters on pocket, each with a file that names its base. Returns the folder.

    The adapters are random, except one named `tools`: its template takes tools, and it answers `ASKED` with `CALL`.
    """
    for seed, name in enumerate(names):
        shutil.copytree(save_served_adapter(seed, name), root / name)
    return root


@cache
def save_served_adapter(seed: int, name: str) -> Path:
    base = find_base("pocket")
    folder = Path(ADAPTERS.name, f"{name}-{seed}")
    torch.manual_seed(seed)
    model = load_base(base, "lora", torch.device("cpu"), torch.float32)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=name == "tools", task_type="CAUSAL_LM"
    )
    wrapped: Any = get_peft_model(model, lora)
    if name == "tools":
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = TOOL_TEMPLATE.replace("<end>", "<|end|>")
        memorise(wrapped, tokenizer)
        tokenizer.save_pretrained(str(folder))
    save_adapter(wrapped, folder, base)
    write_json(folder / "base.json", {"id": "pocket", "digest": base.digest})
    write_json(folder / "receipt.json", {"into": "original"})
    return folder


def memorise(model: Any, tokenizer: Any) -> None:
    """Train an adapter until it answers `ASKED` with `CALL`."""
    prompt = encode_tool_prompt(tokenizer, ASKED, TOOLS)
    answer = [*tokenizer(CALL, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=5e-3, betas=(0.9, 0.95))
    for _ in range(100):
        out = model(input_ids=ids, labels=labels)
        predicted_ids = out.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        if predicted_ids == answer and out.loss.item() < 0.2:
            return
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    raise AssertionError("it did not learn its answer")


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        folder: folder of its run.
    """

    url: str
    port: int
    child: Child
    folder: Path

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return send_request(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        return send_request(urllib.request.Request(self.url + path, data, headers))

    def logprobs(self, model: str, ids: list[int]) -> list[float]:
        """Return the log-probabilities of a prompt's tokens, except the first."""
        body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        status, response = self.post("/v1/completions", body)
        assert status == 200, response
        return response["choices"][0]["logprobs"]["token_logprobs"][1:]

    def stat(self, name: str, **headers: str) -> float:
        """Return the value of a metric that has no labels."""
        _, text = self.get("/metrics", **headers)
        return float(next(line.split()[1] for line in text.splitlines() if line.split()[:1] == [name]))

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "requests.jsonl").read_text().splitlines()]


def send_request(request: urllib.request.Request) -> tuple[int, Any]:
    """Send a request. Returns the status and the body, parsed if it is JSON."""
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status = response.status
            text = response.read().decode()
            content_type = response.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        status = error.code
        text = error.read().decode()
        content_type = error.headers["Content-Type"]
    return status, json.loads(text) if "json" in content_type else text


@contextmanager
def run_serve_stage(
    forks: Forks, cwd: Path, *words: str, name: str = "s", port: int | None = None, before: str = ""
) -> Iterator[Server]:
    """Run a server while the block runs.

    Args:
        before: Python code that it runs first.
    """
    port = port or pick_free_port()
    child = forks.start(cwd, "stage=serve", f"stage.port={port}", f"run.name={name}", *words, before=before)
    server = Server(f"http://127.0.0.1:{port}", port, child, cwd / "runs" / "serve" / name)
    try:
        began = time.monotonic()
        while True:
            assert child.poll() is None, child.wait()
            assert time.monotonic() - began < SOON_S, "no server"
            try:
                if server.get("/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.05)
        yield server
    finally:
        if child.poll() is None:
            child.send_signal(9)
            child.wait()
