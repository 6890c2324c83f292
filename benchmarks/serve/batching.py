"""Measure tokens a second and time to the first token with 1, 8 and 32 clients: eight adapters mixed, and the base.

    python benchmarks/serve/batching.py [--models pocket,smollm2] [--clients 1,8,32] [--seconds 8]
        [--llama-server PATH]

pocket is served in fp32 and other models in bf16. Measured in the same rounds: transformers' continuous batching of the
base, and llama-server, if installed, with the base, one adapter and eight mixed (except for pocket). Our engine and
transformers run in this process, llama-server behind HTTP; each computes with `--threads` threads.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clients import InProcessServer, Server, generate_requests, run_closed_loop
from common import (
    BenchmarkRecord,
    create_engine,
    create_parser,
    create_random_adapters,
    find_bases,
    format_rows,
    round_median,
)
from peer_servers import TransformersServer, read_llama_version, run_llama_server

from align.run import Base

HERE = Path(__file__).resolve().parent
ADAPTERS = 8
COLUMNS = 256
MIXED = tuple(range(ADAPTERS))
Samples = dict[str, dict[int, list[dict[str, float]]]]
"""Case → number of clients → figures of each round."""


class Case(NamedTuple):
    """A server, and the numbers of the adapters that its clients request."""

    name: str
    server: Server
    adapters: Sequence[int | None]


def start_cases(
    base: Base, name: str, max_clients: int, threads: int, binary: str | None, stack: ExitStack
) -> list[Case]:
    """Start all servers of a model. The stack stops them."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    adapters = create_random_adapters(base, ADAPTERS, (16,), folder)
    dtype = torch.float32 if name == "pocket" else torch.bfloat16
    batch = create_engine(base, dtype, max_clients, COLUMNS, max_rank=16)
    engine = InProcessServer(batch, [batch.register(adapter) for adapter in adapters])
    transformers = TransformersServer(base, dtype, max_clients, COLUMNS)
    stack.callback(transformers.close)
    cases = [
        Case("8 adapters", engine, MIXED),
        Case("base", engine, (None,)),
        Case("transformers, base", transformers, (None,)),
    ]
    if binary is not None and name != "pocket":
        llama = stack.enter_context(run_llama_server(binary, base, adapters, max_clients, COLUMNS, threads, folder))
        cases += [
            Case("llama-server, 8 adapters", llama, MIXED),
            Case("llama-server, one adapter", llama, MIXED[:1]),
            Case("llama-server, base", llama, (None,)),
        ]
    return cases


def measure_cases(cases: list[Case], clients: Sequence[int], rounds: int, seconds: float) -> dict[str, Any]:
    """Return the median of the rounds by case and number of clients."""
    for case in cases:  # warm up
        run_closed_loop(case.server, generate_requests(case.adapters, 99), max(clients), seconds / 4)
    samples: Samples = {case.name: {count: [] for count in clients} for case in cases}
    for number in range(rounds):
        for count in clients:
            for case in cases:
                result = run_closed_loop(case.server, generate_requests(case.adapters, number), count, seconds)
                samples[case.name][count].append(result.summarize())
    return compute_medians(samples, 1)


def compute_medians(samples: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]], digits: int) -> dict[str, Any]:
    """Return the median of each figure over the rounds, by case and number of clients."""
    return {
        case: {
            str(count): {key: round_median([figures[key] for figures in rounds], digits) for key in rounds[0]}
            for count, rounds in by_clients.items()
        }
        for case, by_clients in samples.items()
    }


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the Markdown table of README.md."""
    rows = []
    client_counts: dict[str, None] = {}
    for by_case in results["rows"].values():
        client_counts |= dict.fromkeys(next(iter(by_case.values())))
    for model, by_case in results["rows"].items():
        for case, by_clients in by_case.items():
            row = [model, case]
            for count in client_counts:
                figures = by_clients.get(count)
                row.append(
                    f"{figures['tokens_per_s']:.0f} · {figures['p50_ms']:.0f} · {figures['p95_ms']:.0f}"
                    if figures
                    else "–"
                )
            rows.append(row)
    labels = (f"{count} client{'s' if count != '1' else ''}" for count in client_counts)
    return format_rows(["tok/s · TTFT p50 · p95, ms", "", *labels], rows)


def main() -> None:
    parser = create_parser(__doc__, 3, HERE / "batching.json")
    parser.add_argument("--clients", default="1,8,32", help="separated by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="least duration of one case in one round")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="the program")
    options = parser.parse_args()
    binary = options.llama_server
    clients = [int(count) for count in options.clients.split(",")]
    record = BenchmarkRecord(options, [f"llama-server {read_llama_version(binary)}"] if binary else [])
    for name, base in find_bases(options.models).items():
        with ExitStack() as stack:
            cases = start_cases(base, name, max(clients), options.threads, binary, stack)
            record.add(Path(name).name, measure_cases(cases, clients, options.rounds, options.seconds))
    print("\n" + format_table(record.results))


if __name__ == "__main__":
    sys.exit(main())
