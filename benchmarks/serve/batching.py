"""Tokens a second and time to the first token under 1, 8 and 32 clients: eight adapters mixed, and the base.

    python benchmarks/serve/batching.py [--models pocket,smollm2] [--clients 1,8,32] [--seconds 8]
        [--llama-server PATH]

pocket is served in fp32 and other models in bf16. In the same rounds: transformers' continuous batching of the bare
base, and llama-server, where there is one, with the base, one adapter and eight mixed (not beside pocket). Ours and
transformers run in this process, llama-server behind HTTP; each computes with `--threads` threads.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clients import Engine, Server, closed_loop, requests
from common import Record, bases, engine_on, median, options, random_adapters, table
from peers import Transformers, llama_server, version_of

from align.run import Base

HERE = Path(__file__).resolve().parent
ADAPTERS, COLUMNS = 8, 256
MIXED = tuple(range(ADAPTERS))


class Case(NamedTuple):
    """A server, and the adapters that it is asked for."""

    name: str
    server: Server
    adapters: Sequence[int | None]


def cases(base: Base, name: str, most: int, threads: int, binary: str | None, stack: ExitStack) -> list[Case]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    adapters = random_adapters(base, ADAPTERS, (16,), folder)
    dtype = torch.float32 if name == "pocket" else torch.bfloat16
    batch = engine_on(base, dtype, most, COLUMNS, max_rank=16)
    ours = Engine(batch, [batch.register(each) for each in adapters])
    theirs = Transformers(base, dtype, most, COLUMNS)
    stack.callback(theirs.close)
    found = [Case("8 adapters", ours, MIXED), Case("base", ours, (None,)), Case("transformers, base", theirs, (None,))]
    if binary is not None and name != "pocket":
        llama = stack.enter_context(llama_server(binary, base, adapters, most, COLUMNS, threads, folder))
        asked = {"8 adapters": MIXED, "one adapter": MIXED[:1], "base": (None,)}
        found += [Case(f"llama-server, {what}", llama, each) for what, each in asked.items()]
    return found


def measured(given: list[Case], clients: Sequence[int], rounds: int, seconds: float) -> dict[str, Any]:
    """Figures by case and number of clients: the median of the rounds."""
    for case in given:  # warms up
        closed_loop(case.server, requests(case.adapters, 99), max(clients), seconds / 4)
    seen: dict[str, dict[int, list[dict[str, float]]]] = {case.name: {n: [] for n in clients} for case in given}
    for number in range(rounds):
        for count in clients:
            for case in given:
                found = closed_loop(case.server, requests(case.adapters, number), count, seconds)
                seen[case.name][count].append(found.figures())
    return {
        name: {str(n): {key: median([one[key] for one in each], 1) for key in each[0]} for n, each in by.items()}
        for name, by in seen.items()
    }


def format_table(found: dict[str, Any]) -> str:
    """The table of README.md."""
    rows, numbers = [], {}
    for by_case in found["rows"].values():
        numbers |= dict.fromkeys(next(iter(by_case.values())))
    for model, by_case in found["rows"].items():
        for case, by_clients in by_case.items():
            told = (by_clients.get(n) for n in numbers)
            figures = (f and f"{f['tokens_per_s']:.0f} · {f['p50_ms']:.0f} · {f['p95_ms']:.0f}" for f in told)
            rows.append([model, case, *(each or "–" for each in figures)])
    named = (f"{n} client{'s' if n != '1' else ''}" for n in numbers)
    return table(["tok/s · TTFT p50 · p95, ms", "", *named], rows)


def main() -> None:
    parser = options(__doc__, 3, HERE / "batching.json")
    parser.add_argument("--clients", default="1,8,32", help="parted by commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="of one case in one round, at least")
    parser.add_argument("--llama-server", default=shutil.which("llama-server"), help="the program")
    given = parser.parse_args()
    binary, clients = given.llama_server, [int(n) for n in given.clients.split(",")]
    record = Record(given, [f"llama-server {version_of(binary)}"] if binary else [])
    for name, base in bases(given.models).items():
        with ExitStack() as stack:
            chosen = cases(base, name, max(clients), given.threads, binary, stack)
            record.add(Path(name).name, measured(chosen, clients, given.rounds, given.seconds))
    print("\n" + format_table(record.found))


if __name__ == "__main__":
    sys.exit(main())
