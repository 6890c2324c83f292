"""Measure the whole server by HTTP with 1, 8 and 32 clients; its answers are streamed.

    python benchmarks/serve/over_http.py [--models pocket,smollm2] [--clients 1,8,32] [--seconds 8]

`stage=serve` runs in a process of its own, on the first core if processes can be pinned, and the clients here on the
second. Measured in the same rounds: transformers' continuous batching of the base, in a process without HTTP, on the
first core too. `cpu_ms` is the processor time per token, which other work on the machine disturbs less than tokens a
second; `cpu_http` is the share of it that was spent outside the engine's thread.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from batching import Samples, compute_medians, format_table
from clients import ClientRequest, generate_requests, run_closed_loop
from common import BenchmarkRecord, create_parser, create_random_adapters, find_bases
from peer_servers import LlamaServer, TransformersServer, stream_events

from align.run import Base, write_json

HERE = Path(__file__).resolve().parent
ADAPTERS = 8
COLUMNS = 256


class HttpServer(LlamaServer):
    """A server with OpenAI's API and streamed answers, to which prompts are sent as token ids."""

    def __init__(self, port: int, base: str) -> None:
        super().__init__(port, ADAPTERS)
        self.base = base

    def _stream(self, request: ClientRequest) -> Iterator[tuple[int, bool]]:
        body = {
            "model": self.base if request.adapter is None else f"a{request.adapter}",
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "seed": request.seed,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        for received, event in enumerate(stream_events(self.port, "/v1/completions", body)):
            if event.get("usage"):  # an event may carry several tokens; the last event has their exact number
                yield event["usage"]["completion_tokens"] - received, True
                return
            yield 1, False
        raise RuntimeError("the server closed the stream before the end of the answer")


@contextmanager
def run_server(base: Base, dtype: str, slots: int, threads: int, work: Path, *arguments: str) -> Iterator[HttpServer]:
    """Start `stage=serve` with eight adapters.

    Args:
        arguments: further arguments of its command line.
    """
    folders = create_random_adapters(base, ADAPTERS, (16,), work / "adapters")
    for folder in folders:
        write_base_metadata(folder, base)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    names = ", ".join(f"a{i}: {folder}" for i, folder in enumerate(folders))
    command = [
        *(sys.executable, "-m", "align", "stage=serve", f"model={base.id}", "method=lora", f"dtype={dtype}"),
        *(f"stage.adapters={{{names}}}", f"stage.port={port}", f"stage.slots={slots}", "stage.prefix_cache_mb=0"),
        *("stage.max_rank=16", f"run.root={work / 'runs'}"),
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (work / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    pin_to_core(process.pid, 0)
    try:
        wait_until_ready(port, process, work / "server.log")
        yield HttpServer(port, Path(base.id).name)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def write_base_metadata(folder: Path, base: Base) -> None:
    """Write the files by which an exported adapter names its base."""
    write_json(folder / "base.json", {"id": base.id, "digest": base.digest})
    write_json(folder / "receipt.json", {"into": "original"})


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers.

    Raises:
        RuntimeError: the process has ended. The message is its log.
    """
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1)
            return
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.1)


def pin_to_core(pid: int, core: int) -> None:
    """Pin a process (0 for this one) to a core, if the machine has several and the system can."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(pid, {core})


def read_cpu_seconds(port: int) -> tuple[float, float]:
    """Return the server's processor seconds so far: of the whole process, and of its engine's thread."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    process, engine = (re.search(rf"^align_{name}cpu_seconds_total (\S+)$", text, re.M) for name in ("", "engine_"))
    assert process
    assert engine
    return float(process[1]), float(engine[1])


def measure_servers(name: str, base: Base, clients: Sequence[int], options: Any) -> dict[str, Any]:
    """Return the median of the rounds by case and number of clients."""
    dtype = torch.float32 if name == "pocket" else torch.bfloat16
    samples: Samples = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        slots = max(clients)
        pin_to_core(0, 0)  # the threads of transformers start here and stay on this core
        transformers = TransformersServer(base, dtype, slots, COLUMNS)
        stack.callback(transformers.close)
        dtype_name = str(dtype).removeprefix("torch.")
        http_server = stack.enter_context(run_server(base, dtype_name, slots, options.threads, work))
        cases: dict[str, tuple[Any, Sequence[int | None]]] = {
            "8 adapters by HTTP": (http_server, tuple(range(ADAPTERS))),
            "base by HTTP": (http_server, (None,)),
            "transformers, base": (transformers, (None,)),
        }
        for server, adapters in cases.values():  # warm up
            run_closed_loop(server, generate_requests(adapters, 99), slots, options.seconds / 4)
        for number in range(options.rounds):
            for count in clients:
                for case, (server, adapters) in cases.items():
                    pin_to_core(0, 0 if server is transformers else 1)
                    server_start = read_cpu_seconds(http_server.port)
                    process_start = time.process_time()
                    result = run_closed_loop(server, generate_requests(adapters, number), count, options.seconds)
                    cpu_s = time.process_time() - process_start
                    figures = result.summarize()
                    if server is http_server:
                        server_end = read_cpu_seconds(http_server.port)
                        cpu_s, engine_s = (end - start for start, end in zip(server_start, server_end, strict=True))
                        figures["cpu_http"] = 1 - engine_s / cpu_s
                    figures["cpu_ms"] = 1e3 * cpu_s / result.tokens
                    samples.setdefault(case, {}).setdefault(count, []).append(figures)
    return compute_medians(samples, 3)


def main() -> None:
    parser = create_parser(__doc__, 3, HERE / "over_http.json")
    parser.add_argument("--clients", default="1,8,32", help="separated by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="least duration of one case in one round")
    options = parser.parse_args()
    clients = [int(count) for count in options.clients.split(",")]
    record = BenchmarkRecord(options)
    for name, base in find_bases(options.models).items():
        record.add(Path(name).name, measure_servers(name, base, clients, options))
    print("\n" + format_table(record.results))


if __name__ == "__main__":
    sys.exit(main())
