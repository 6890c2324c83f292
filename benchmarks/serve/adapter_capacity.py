"""Measure the memory and load time of 32 adapters, the answers to requests for 1,000 registered adapters while 16 are
resident, and the memory and start-up time of a whole process.

    python benchmarks/serve/adapter_capacity.py [--models pocket,smollm2] [--adapters 32] [--registered 1000]

Each measurement runs in a process of its own, in fp32. The registered adapters differ in their scale and share the
weight files of a few, which are in the page cache: loading an adapter reads, hashes and lays it out, but not from disk.
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
from clients import InProcessServer, generate_requests, run_closed_loop
from common import (
    FIRST_ID,
    BenchmarkRecord,
    create_engine,
    create_parser,
    create_random_adapters,
    find_bases,
    format_rows,
    quantile,
    round_median,
)
from work import RESULT, result_of

from align.models.base import find_base
from align.models.load import build_skeleton, load_tokenizer
from align.rollout.serving_engine import Output, Request, SamplingParams
from align.run import Base

HERE = Path(__file__).resolve().parent
IMPORTED_AT = time.perf_counter()
SLOTS = 16
COLUMNS = 256
RESIDENT = 16
RANK = 16
ADAPTERS = 32
CLIENTS = 8
MB = 1 << 20


def read_memory_mb(name: str = "VmRSS") -> float:
    """Return this process's memory: `VmRSS` is its present size, `VmHWM` its peak."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) / 1024


def read_weights_mb(folder: Path) -> float:
    return (folder / "adapter_model.safetensors").stat().st_size / MB


def measure_without_model(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the memory of a process that loads the tokenizer but no model."""
    load_tokenizer(find_base(settings["model"]))
    return {"rss_mb": read_memory_mb()}


def measure_loading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Load adapters into the bank one by one, as requests would."""
    folders = [Path(folder) for folder in settings["folders"]]
    base = find_base(settings["model"])
    batch = create_engine(base, torch.float32, SLOTS, COLUMNS, resident=len(folders), max_rank=RANK)
    digests = [batch.register(folder) for folder in folders]
    memory_before = read_memory_mb()
    load_ms = []
    for digest in digests:
        start = time.perf_counter()
        batch.decoder.bank.load(digest, batch.known.folder(digest), set())
        load_ms.append(1e3 * (time.perf_counter() - start))
    return {
        "adapters": len(folders),
        "files_mb": sum(map(read_weights_mb, folders)),
        "grown_mb": read_memory_mb() - memory_before,
        "load_ms": statistics.median(load_ms),
        "slowest_ms": max(load_ms),
    }


def measure_process(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return a serving process's time to the first token, and its memory when bank and cache are full."""
    base = find_base(settings["model"])
    folders = [Path(folder) for folder in settings["folders"][:RESIDENT]]
    load_tokenizer(base)
    batch = create_engine(base, torch.float32, SLOTS, COLUMNS, resident=RESIDENT, max_rank=RANK)
    digests = [batch.register(folder) for folder in folders]
    token_times: list[float] = []

    def record_time(output: Output) -> None:
        assert output.error is None, output.error
        if output.tokens:
            token_times.append(time.perf_counter() - IMPORTED_AT)

    def add_request(prompt_tokens: int, new_tokens: int, digest: str) -> None:
        batch.add(Request((FIRST_ID,) * prompt_tokens, SamplingParams(new_tokens), digest), record_time)

    add_request(20, 1, digests[0])
    while batch.step():
        pass
    for slot in range(SLOTS):
        add_request(COLUMNS - 2, 2, digests[slot % len(digests)])
    while batch.step():
        pass
    decoder = batch.decoder
    return {
        "ready_s": token_times[0],
        "rss_mb": read_memory_mb(),
        "peak_mb": read_memory_mb("VmHWM"),
        "base_mb": compute_base_mb(base),
        "bank_mb": sum(map(read_weights_mb, folders)),
        "cache_mb": sum(tensor.nbytes for tensor in (*decoder.keys, *decoder.values)) / MB,
    }


def compute_base_mb(base: Base) -> float:
    """Return the size of the base's weights in fp32. Tied weights are counted once."""
    return sum(4 * parameter.numel() for parameter in build_skeleton(base).parameters()) / MB


def measure_registered(settings: Mapping[str, Any]) -> dict[str, float]:
    """Let clients request one of many registered adapters each time."""
    base = find_base(settings["model"])
    batch = create_engine(base, torch.float32, SLOTS, COLUMNS, resident=RESIDENT, max_rank=RANK)
    with tempfile.TemporaryDirectory(dir=settings["work"]) as work:
        sources = [Path(folder) for folder in settings["folders"]]
        folders = list(create_rescaled_adapters(sources, settings["registered"], Path(work)))
        start = time.perf_counter()
        digests = [batch.register(folder) for folder in folders]
        register_ms = 1e3 * (time.perf_counter() - start) / len(digests)
        assert len(set(digests)) == len(folders)
        requests = generate_requests(range(len(digests)), 0)
        # Raises if a request fails.
        result = run_closed_loop(InProcessServer(batch, digests), requests, CLIENTS, settings["seconds"])
    ttft_ms = [1e3 * seconds for seconds in result.ttft_s]
    return {
        "registered": len(digests),
        "requests": len(ttft_ms),
        "asked_for": len(set(result.adapters)),
        "register_ms": register_ms,
        "tokens_per_s": result.tokens_per_s,
        "p50_ms": quantile(ttft_ms, 0.5),
        "p95_ms": quantile(ttft_ms, 0.95),
    }


def create_rescaled_adapters(folders: list[Path], count: int, parent: Path) -> Iterator[Path]:
    """Yield folders of adapters that share the weight files of the given ones and differ in their scale."""
    for number in range(count):
        source = folders[number % len(folders)]
        target = parent / str(number)
        target.mkdir()
        config = json.loads((source / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16 + number}))
        os.link(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
        yield target


CHILDREN: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "bare": measure_without_model,
    "loading": measure_loading,
    "process": measure_process,
    "registered": measure_registered,
}
"""Key of the result → the measurement that a child process makes."""


def run_children(model: str, base: Base, options: Any) -> dict[str, dict[str, float]]:
    """Run each measurement in a child process once a round. Returns the medians of the rounds."""
    with tempfile.TemporaryDirectory() as work:
        folders = create_random_adapters(base, max(options.adapters, RESIDENT), (RANK,), Path(work))
        settings = {
            "model": model,
            "folders": [str(folder) for folder in folders],
            "work": work,
            "registered": options.registered,
            "seconds": options.seconds,
            "threads": options.threads,
        }
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in CHILDREN}
        for _ in range(options.rounds):
            for name in CHILDREN:
                command = [sys.executable, str(Path(__file__)), "--child", name, json.dumps(settings)]
                samples[name].append(result_of(command))
    return {
        name: {key: round_median([figures[key] for figures in rounds]) for key in rounds[0]}
        for name, rounds in samples.items()
    }


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the two Markdown tables of README.md."""
    adapter_rows = []
    memory_rows = []
    for model, row in results["rows"].items():
        loading, registered, process = (row[name] for name in ("loading", "registered", "process"))
        growth = loading["grown_mb"] / loading["files_mb"]
        adapter_rows.append(
            [
                model,
                f"{loading['grown_mb']:.0f} / {loading['files_mb']:.0f} = {growth:.2f} (≤ 1.1)",
                f"{loading['load_ms']:.0f}, at most {loading['slowest_ms']:.0f} (≤ 100)",
                f"{registered['register_ms']:.1f}",
                f"{registered['requests']:.0f}",
                f"{registered['p50_ms']:.0f}",
                f"{registered['p95_ms']:.0f} (≤ 1500)",
            ]
        )
        bare_mb = row["bare"]["rss_mb"]
        parts = [process[f"{name}_mb"] for name in ("base", "bank", "cache")]
        rss_ratio, peak_ratio = ((process[key] - bare_mb) / sum(parts) for key in ("rss_mb", "peak_mb"))
        memory_rows.append(
            [
                model,
                f"{bare_mb:.0f}",
                " + ".join(f"{part:.0f}" for part in parts),
                f"{process['rss_mb']:.0f}: {rss_ratio:.2f} (≤ 1.5)",
                f"{process['peak_mb']:.0f}: {peak_ratio:.2f}",
                f"{process['ready_s']:.1f} (≤ 6)",
            ]
        )
    first_row = next(iter(results["rows"].values()))
    adapter_columns = (
        "",
        f"{first_row['loading']['adapters']:.0f} adapters: MB over their files",
        "load, ms",
        "register, ms",
        f"requests over {first_row['registered']['registered']:.0f} registered",
        "TTFT p50, ms",
        "p95",
    )
    memory_columns = ("MB", "without a model", "base + bank + cache", "RSS, full: over these", "peak", "first token, s")
    return format_rows(adapter_columns, adapter_rows) + "\n" + format_rows(memory_columns, memory_rows)


def main() -> None:
    parser = create_parser(__doc__, 3, HERE / "many.json")
    parser.add_argument("--adapters", type=int, default=ADAPTERS, help="at least the number of resident ones")
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of the requests for registered adapters")
    options = parser.parse_args()
    record = BenchmarkRecord(options)
    for name, base in find_bases(options.models).items():
        record.add(Path(name).name, run_children(name, base, options))
    print("\n" + format_table(record.results))


def run_child(name: str, settings_json: str) -> None:
    """Make one measurement in this process, and print it for the parent."""
    settings = json.loads(settings_json)
    torch.set_num_threads(settings["threads"])
    print(RESULT + json.dumps(CHILDREN[name](settings)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
    else:
        main()
