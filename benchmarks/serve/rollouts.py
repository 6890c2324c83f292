"""Compare rollouts of eight adapters in one batch with as many rows of one adapter: `rollout.engine=bank` and `hf`.

    python benchmarks/serve/rollouts.py [--models pocket,smollm2] [--rows 64] [--tokens 32] [--rounds 5]

Then measure PPO's own sampling by `../ppo/rollout.py`: 16 responses of 64 tokens, with each engine and transformers'
`generate` in a process of its own, by turns.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clients import generate_requests
from common import PPO, BenchmarkRecord, create_parser, create_random_adapters, find_bases, format_rows, round_median
from work import Work, result_of

from align.models.actors import AdapterPool
from align.models.load import load_base, load_tokenizer
from align.rollout.hf import HfEngine
from align.rollout.multi_adapter import BankEngine
from align.run import Base

HERE = Path(__file__).resolve().parent
ADAPTERS = 8
RATIO_BAR = 1.35
"""Largest ratio of the seconds with eight adapters to the seconds with one."""
SAMPLERS = ("generate", "ours", "bank")


def measure_engines(base: Base, rows: int, tokens: int, rounds: int, folder: Path) -> dict[str, float]:
    """Return the seconds of one call, by engine and number of different adapters among its rows."""
    pool = AdapterPool(load_base(base, "lora", torch.device("cpu"), torch.float32))
    adapters = create_random_adapters(base, ADAPTERS, (16,), folder)
    actors = [pool.actor(pool.add(adapter)) for adapter in adapters]
    pad_id = load_tokenizer(base).pad_token_id
    engines = {"bank": BankEngine((), pad_id, tokens, max_rank=16), "hf": HfEngine((), pad_id, tokens)}
    requests = generate_requests((None,), 0)
    prompts = [next(requests).prompt_ids for _ in range(rows)]
    row_actors = {
        "8 adapters": [actors[row % ADAPTERS] for row in range(rows)],
        "one adapter": [actors[0]] * rows,
    }
    cases: dict[str, Callable[[], object]] = {}
    for name, engine in engines.items():
        engine.load(base, "lora", torch.float32)
        for label, policies in row_actors.items():
            cases[f"{name}, {label}"] = lambda engine=engine, policies=policies: engine.generate(
                prompts, policies, range(rows)
            )
    seconds = time_cases(cases, rounds)
    for engine in engines.values():
        engine.close()
    return seconds


def time_cases(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run the cases by turns. Returns the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: round_median(samples, 3) for name, samples in seconds.items()}


def measure_ppo_sampling(model: str, dtype: str, threads: int, rounds: int) -> dict[str, float]:
    """Return the responses a second of each sampler."""
    work = Work(model, 16, 64, 1, 4, dtype)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{PPO}:{HERE.parents[1]}"}
    samples_per_s: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for _ in range(rounds):
        for name in SAMPLERS:
            result = result_of([sys.executable, str(PPO / "rollout.py"), work.text(), name])
            samples_per_s[name].append(result["samples_per_s"])
    return {name: round_median(samples) for name, samples in samples_per_s.items()}


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the two Markdown tables of README.md."""
    engine_rows = []
    sampling_rows = []
    for name, row in results["rows"].items():
        if "generate" in row:
            ratios = (f"{row[sampler]:.2f}: {row[sampler] / row['generate']:.2f}" for sampler in ("ours", "bank"))
            sampling_rows.append([name, f"{row['generate']:.2f}", *ratios])
            continue
        cells = [name]
        for engine, bar in (("bank", f" (≤ {RATIO_BAR:g})"), ("hf", "")):
            single = row[f"{engine}, one adapter"]
            mixed = row[f"{engine}, 8 adapters"]
            cells += [f"{single:.2f}", f"{mixed:.2f}", f"{mixed / single:.2f}{bar}"]
        engine_rows.append(cells)
    engine_columns = ("s", "bank, one adapter", "bank, 8", "ratio", "hf, one adapter", "hf, 8", "ratio")
    sampling_columns = ("responses a second", "`generate`", "`rollout.engine=hf`", "`rollout.engine=bank`")
    return format_rows(engine_columns, engine_rows) + "\n" + format_rows(sampling_columns, sampling_rows)


def main() -> None:
    parser = create_parser(__doc__, 5, HERE / "rollouts.json")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtypes", default="bfloat16", help="dtypes of PPO's sampling; empty to skip it")
    options = parser.parse_args()
    record = BenchmarkRecord(options)
    for name, base in find_bases(options.models).items():
        label = Path(name).name
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure_engines(base, options.rows, options.tokens, options.rounds, Path(folder))
        record.add(f"{label} fp32, {options.rows} rows", seconds)
        gc.collect()
        for dtype in filter(None, options.dtypes.split(",")):
            rounds = min(options.rounds, 3)
            record.add(f"{label} {dtype}", measure_ppo_sampling(name, dtype, options.threads, rounds))
    print("\n" + format_table(record.results))


if __name__ == "__main__":
    sys.exit(main())
