"""A server of `stage=serve` in a process of its own, on the built-in model with small adapters of its."""

from __future__ import annotations

import json
import shutil
import socket
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
from peft import LoraConfig, get_peft_model
from processes import Child, Forks
from templates import TOOL_TEMPLATE
from waiting import SOON_S

from align.data.chat.tools import encode_tool_prompt
from align.models.adapters import save_adapter
from align.models.base import find_base
from align.models.load import load_base, load_tokenizer
from align.run import write_json

MADE = TemporaryDirectory(prefix="align-adapters-")
CALL = '<tool_call>{"name": "rain", "arguments": {"in": "Oslo"}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
ASKED = [{"role": "user", "content": "Rain in Oslo?"}]


def adapters(root: Path, *names: str) -> Path:
    """A folder with adapters on pocket, each of which says on which base it was made. They are random, but for one that
    is called `tools`: its template takes tools, and it calls one when it is asked `ASKED`."""
    for seed, name in enumerate(names):
        shutil.copytree(adapter(seed, name), root / name)
    return root


@cache
def adapter(seed: int, name: str) -> Path:
    base, folder = find_base("pocket"), Path(MADE.name, f"{name}-{seed}")
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
    """Trains an adapter until it answers `ASKED` by `CALL`."""
    prompt = encode_tool_prompt(tokenizer, ASKED, TOOLS)
    answer = [*tokenizer(CALL, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *answer]])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=5e-3, betas=(0.9, 0.95))
    for _ in range(100):
        out = model(input_ids=ids, labels=labels)
        said = out.logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        if said == answer and out.loss.item() < 0.2:
            return
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    raise AssertionError("it did not learn its answer")


@dataclass(frozen=True)
class Server:
    """Attributes:
    folder: of its run.
    """

    url: str
    port: int
    child: Child
    folder: Path

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return fetched(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        return fetched(urllib.request.Request(self.url + path, data, headers))

    def logprobs(self, model: str, ids: list[int]) -> list[float]:
        """Of a prompt's tokens, but for the first."""
        body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        status, found = self.post("/v1/completions", body)
        assert status == 200, found
        return found["choices"][0]["logprobs"]["token_logprobs"][1:]

    def stat(self, name: str, **headers: str) -> float:
        """A metric without labels."""
        _, text = self.get("/metrics", **headers)
        return float(next(line.split()[1] for line in text.splitlines() if line.split()[:1] == [name]))

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "requests.jsonl").read_text().splitlines()]


def fetched(request: urllib.request.Request) -> tuple[int, Any]:
    """Status, and the body: JSON, or text."""
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, text, kind = answer.status, answer.read().decode(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        status, text, kind = error.code, error.read().decode(), error.headers["Content-Type"]
    return status, json.loads(text) if "json" in kind else text


@contextmanager
def serving(
    forks: Forks, cwd: Path, *words: str, name: str = "s", port: int | None = None, before: str = ""
) -> Iterator[Server]:
    """A server for as long as the block lasts.

    Args:
        before: Python that it runs first.
    """
    port = port or free_port()
    child = forks.start(cwd, "stage=serve", f"stage.port={port}", f"run.name={name}", *words, before=before)
    server = Server(f"http://127.0.0.1:{port}", port, child, cwd / "runs" / "serve" / name)
    try:
        began = time.monotonic()
        while True:
            assert child.poll() is None, child.ended()
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
            child.ended()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
