"""Memory and loading: 32 adapters, 1,000 registered with 16 resident, a whole process, and the time until it answers.

    python benchmarks/serve/many.py [--models pocket,smollm2] [--adapters 32] [--registered 1000]

Each figure is taken in a process of its own, fp32. The registered adapters have their own scale each and share the
weight files of a few, which lie in the page cache: a cold adapter is read, hashed and laid out, but not from the disk.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from clients import Engine, closed_loop, requests
from common import FIRST_ID, Record, bases, engine_on, median, options, quantile, random_adapters, table
from work import RESULT, result_of

from align.models.base import find_base
from align.models.load import build_skeleton, load_tokenizer
from align.rollout.serving_engine import Output, Request, SamplingParams
from align.run import Base

HERE = Path(__file__).resolve().parent
IMPORTED = time.perf_counter()
SLOTS, COLUMNS, RESIDENT, RANK, FILES, CLIENTS = 16, 256, 16, 16, 32, 8
MB = 1 << 20


def memory_mb(name: str = "VmRSS") -> float:
    """Of this process: `VmRSS` now, `VmHWM` at the most."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def weights_mb(folder: Path) -> float:
    return (folder / "adapter_model.safetensors").stat().st_size / MB


def bare(given: Mapping[str, Any]) -> dict[str, float]:
    """The process without a model."""
    load_tokenizer(find_base(given["model"]))
    return {"rss_mb": memory_mb()}


def loading(given: Mapping[str, Any]) -> dict[str, Any]:
    """Adapters into the bank, one by one, as a request brings them in."""
    folders = [Path(folder) for folder in given["folders"]]
    batch = engine_on(find_base(given["model"]), torch.float32, SLOTS, COLUMNS, resident=len(folders), max_rank=RANK)
    digests = [batch.register(folder) for folder in folders]
    before, took = memory_mb(), []
    for digest in digests:
        began = time.perf_counter()
        batch.decoder.bank.load(digest, batch.known.folder(digest), set())
        took.append(1e3 * (time.perf_counter() - began))
    files = sum(map(weights_mb, folders))
    return {"adapters": len(folders), "files_mb": files, "grown_mb": memory_mb() - before,
            "load_ms": statistics.median(took), "slowest_ms": max(took)}  # fmt: skip


def process(given: Mapping[str, Any]) -> dict[str, float]:
    """A process that serves: until its first token, and with bank and cache full."""
    base, folders = find_base(given["model"]), [Path(folder) for folder in given["folders"][:RESIDENT]]
    load_tokenizer(base)
    batch = engine_on(base, torch.float32, SLOTS, COLUMNS, resident=RESIDENT, max_rank=RANK)
    digests = [batch.register(folder) for folder in folders]
    first: list[float] = []

    def hear(output: Output) -> None:
        assert output.error is None, output.error
        if output.tokens:
            first.append(time.perf_counter() - IMPORTED)

    def ask(prompt: int, new: int, digest: str) -> None:
        batch.add(Request((FIRST_ID,) * prompt, SamplingParams(new), digest), hear)

    ask(20, 1, digests[0])
    while batch.step():
        pass
    for slot in range(SLOTS):
        ask(COLUMNS - 2, 2, digests[slot % len(digests)])
    while batch.step():
        pass
    decoder = batch.decoder
    cache = sum(t.nbytes for t in (*decoder.keys, *decoder.values)) / MB
    bank = sum(map(weights_mb, folders))
    return {"ready_s": first[0], "rss_mb": memory_mb(), "peak_mb": memory_mb("VmHWM"), "base_mb": base_mb(base),
            "bank_mb": bank, "cache_mb": cache}  # fmt: skip


def base_mb(base: Base) -> float:
    """Of the weights in fp32, tied ones counted once."""
    return sum(4 * parameter.numel() for parameter in build_skeleton(base).parameters()) / MB


def registered(given: Mapping[str, Any]) -> dict[str, float]:
    """Clients who ask for one of very many adapters each time."""
    batch = engine_on(find_base(given["model"]), torch.float32, SLOTS, COLUMNS, resident=RESIDENT, max_rank=RANK)
    with tempfile.TemporaryDirectory(dir=given["work"]) as work:
        folders = list(rescaled([Path(folder) for folder in given["folders"]], given["registered"], Path(work)))
        began = time.perf_counter()
        digests = [batch.register(folder) for folder in folders]
        register_ms = 1e3 * (time.perf_counter() - began) / len(digests)
        assert len(set(digests)) == len(folders)
        asked = requests(range(len(digests)), 0)
        seen = closed_loop(Engine(batch, digests), asked, CLIENTS, given["seconds"])  # raises where a request fails
    ms = [1e3 * each for each in seen.ttft_s]
    return {"registered": len(digests), "requests": len(ms), "asked_for": len(set(seen.adapters)),
            "register_ms": register_ms, "tokens_per_s": seen.tokens_per_s, "p50_ms": quantile(ms, 0.5),
            "p95_ms": quantile(ms, 0.95)}  # fmt: skip


def rescaled(folders: list[Path], count: int, into: Path) -> Iterator[Path]:
    """So many adapters, each with its own scale, on the weights of these."""
    for number in range(count):
        source, target = folders[number % len(folders)], into / str(number)
        target.mkdir()
        config = json.loads((source / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16 + number}))
        os.link(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
        yield target


CHILDREN: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "bare": bare, "loading": loading, "process": process, "registered": registered,
}  # fmt: skip


def figures(model: str, base: Base, given: Any) -> dict[str, dict[str, float]]:
    """The median of the rounds, by process."""
    with tempfile.TemporaryDirectory() as work:
        folders = random_adapters(base, max(given.adapters, RESIDENT), (RANK,), Path(work))
        told = {"model": model, "folders": [str(folder) for folder in folders], "work": work,
                "registered": given.registered, "seconds": given.seconds, "threads": given.threads}  # fmt: skip
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CHILDREN}
        for _ in range(given.rounds):
            for name in CHILDREN:
                found[name].append(result_of([sys.executable, str(Path(__file__)), "--child", name, json.dumps(told)]))
    return {name: {key: median([one[key] for one in each]) for key in each[0]} for name, each in found.items()}


def format_table(found: dict[str, Any]) -> str:
    """The tables of README.md."""
    kept, whole = [], []
    for model, row in found["rows"].items():
        one, many, process, bare = (row[name] for name in ("loading", "registered", "process", "bare"))
        kept.append([
            model, f"{one['grown_mb']:.0f} / {one['files_mb']:.0f} = {one['grown_mb'] / one['files_mb']:.2f} (≤ 1.1)",
            f"{one['load_ms']:.0f}, at most {one['slowest_ms']:.0f} (≤ 100)", f"{many['register_ms']:.1f}",
            f"{many['requests']:.0f}", f"{many['p50_ms']:.0f}", f"{many['p95_ms']:.0f} (≤ 1500)",
        ])  # fmt: skip
        parts = [process[f"{name}_mb"] for name in ("base", "bank", "cache")]
        over = [(process[key] - bare["rss_mb"]) / sum(parts) for key in ("rss_mb", "peak_mb")]
        whole.append([
            model, f"{bare['rss_mb']:.0f}", " + ".join(f"{part:.0f}" for part in parts),
            f"{process['rss_mb']:.0f}: {over[0]:.2f} (≤ 1.5)", f"{process['peak_mb']:.0f}: {over[1]:.2f}",
            f"{process['ready_s']:.1f} (≤ 6)",
        ])  # fmt: skip
    one, many = (next(iter(found["rows"].values()))[name] for name in ("loading", "registered"))
    columns = ("", f"{one['adapters']:.0f} adapters: MB over their files", "load, ms", "register, ms",
               f"requests over {many['registered']:.0f} registered", "TTFT p50, ms", "p95")  # fmt: skip
    memory = ("MB", "without a model", "base + bank + cache", "RSS, full: over these", "peak", "first token, s")
    return table(columns, kept) + "\n" + table(memory, whole)


def main() -> None:
    parser = options(__doc__, 3, HERE / "many.json")
    parser.add_argument("--adapters", type=int, default=FILES, help="at least as many as are resident")
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of requests for registered adapters")
    given = parser.parse_args()
    record = Record(given)
    for name, base in bases(given.models).items():
        record.add(Path(name).name, figures(name, base, given))
    print("\n" + format_table(record.found))


def child(name: str, told: str) -> None:
    given = json.loads(told)
    torch.set_num_threads(given["threads"])
    print(RESULT + json.dumps(CHILDREN[name](given)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
