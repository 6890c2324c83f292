"""The whole server under 1, 8 and 32 clients by HTTP, and one client at a time; its answers are streamed.

    python benchmarks/serve/over_http.py [--models pocket,smollm2] [--clients 1,8,32] [--seconds 8]

`stage=serve` runs in a process of its own, on the first core where the system can pin one, the clients here on the
second. In the same rounds: transformers' continuous batching of the bare base, in a process without HTTP, on the first
core too. `cpu_ms` is the processor time a token, which others on the machine disturb less than tokens a second;
`cpu_http` the share of it that did not go to the engine's thread.
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
from batching import format_table
from clients import Asked, closed_loop, requests
from common import Record, bases, median, options, random_adapters
from peers import LlamaServer, Transformers, streamed

from align.run import Base, write_json

HERE = Path(__file__).resolve().parent
ADAPTERS, COLUMNS = 8, 256


class Http(LlamaServer):
    """A server of OpenAI's API, streamed; asked by token ids."""

    def __init__(self, port: int, base: str) -> None:
        super().__init__(port, ADAPTERS)
        self.base = base

    def _stream(self, asked: Asked) -> Iterator[tuple[int, bool]]:
        model = self.base if asked.adapter is None else f"a{asked.adapter}"
        body = {
            "model": model, "prompt": list(asked.ids), "max_tokens": asked.new, "seed": asked.seed, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        for seen, told in enumerate(streamed(self.port, "/v1/completions", body)):
            if told.get("usage"):  # a piece of text may be of several tokens: what is left is told at the end
                yield told["usage"]["completion_tokens"] - seen, True
                return
            yield 1, False
        raise RuntimeError("the server ended an answer half-way")


@contextmanager
def our_server(base: Base, dtype: str, slots: int, threads: int, work: Path, *more: str) -> Iterator[Http]:
    """`stage=serve` with eight adapters.

    Args:
        more: words of its command line.
    """
    folders = random_adapters(base, ADAPTERS, (16,), work / "adapters")
    for folder in folders:
        says_its_base(folder, base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ", ".join(f"a{i}: {folder}" for i, folder in enumerate(folders))
    words = [
        sys.executable, "-m", "align", "stage=serve", f"model={base.id}", "method=lora", f"dtype={dtype}",
        f"stage.adapters={{{names}}}", f"stage.port={port}", f"stage.slots={slots}", "stage.prefix_cache_mb=0",
        "stage.max_rank=16", f"run.root={work / 'runs'}", *more,
    ]  # fmt: skip
    with (work / "server.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    pin(process.pid, 0)
    try:
        wait_for(port, process, work / "server.log")
        yield Http(port, Path(base.id).name)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def says_its_base(folder: Path, base: Base) -> None:
    """Writes into an adapter's folder what an export says of its base."""
    write_json(folder / "base.json", {"id": base.id, "digest": base.digest})
    write_json(folder / "receipt.json", {"into": "original"})


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1)
            return
        except OSError:
            if process.poll() is not None:
                raise RuntimeError(log.read_text()) from None
            time.sleep(0.1)


def pin(process: int, core: int) -> None:
    """To one core, where there are several and the system can."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(process, {core})


def cpu_s(port: int) -> tuple[float, float]:
    """Processor time so far: of the whole server, and of its engine's thread."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    whole, engine = (re.search(rf"^align_{name}cpu_seconds_total (\S+)$", text, re.M) for name in ("", "engine_"))
    assert whole
    assert engine
    return float(whole[1]), float(engine[1])


def measured(name: str, base: Base, clients: Sequence[int], given: Any) -> dict[str, Any]:
    """Figures by case and number of clients: the median of the rounds."""
    dtype = torch.float32 if name == "pocket" else torch.bfloat16
    seen: dict[str, dict[int, list[dict[str, float]]]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        slots = max(clients)
        pin(0, 0)  # its threads begin here, and stay on this core
        theirs = Transformers(base, dtype, slots, COLUMNS)
        stack.callback(theirs.close)
        kind = str(dtype).removeprefix("torch.")
        ours = stack.enter_context(our_server(base, kind, slots, given.threads, work))
        cases: dict[str, tuple[Any, Sequence[int | None]]] = {
            "8 adapters by HTTP": (ours, tuple(range(ADAPTERS))), "base by HTTP": (ours, (None,)),
            "transformers, base": (theirs, (None,)),
        }  # fmt: skip
        for server, adapters in cases.values():  # warms up
            closed_loop(server, requests(adapters, 99), slots, given.seconds / 4)
        for number in range(given.rounds):
            for count in clients:
                for case, (server, adapters) in cases.items():
                    pin(0, 0 if server is theirs else 1)
                    before, own = cpu_s(ours.port), time.process_time()
                    found = closed_loop(server, requests(adapters, number), count, given.seconds)
                    whole, figures = time.process_time() - own, found.figures()
                    if server is ours:
                        whole, engine = (b - a for a, b in zip(before, cpu_s(ours.port), strict=True))
                        figures["cpu_http"] = 1 - engine / whole
                    figures["cpu_ms"] = 1e3 * whole / found.tokens
                    seen.setdefault(case, {}).setdefault(count, []).append(figures)
    return {
        case: {str(n): {key: median([one[key] for one in each], 3) for key in each[0]} for n, each in by.items()}
        for case, by in seen.items()
    }


def main() -> None:
    parser = options(__doc__, 3, HERE / "over_http.json")
    parser.add_argument("--clients", default="1,8,32", help="parted by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one case in one round, at least")
    given = parser.parse_args()
    clients = [int(n) for n in given.clients.split(",")]
    record = Record(given)
    for name, base in bases(given.models).items():
        record.add(Path(name).name, measured(name, base, clients, given))
    print("\n" + format_table(record.found))


if __name__ == "__main__":
    sys.exit(main())
