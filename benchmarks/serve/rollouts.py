"""Rollouts of eight adapters in one batch, beside as many rows of one adapter: `rollout.engine=bank` and `hf`.

    python benchmarks/serve/rollouts.py [--models pocket,smollm2] [--rows 64] [--tokens 32] [--rounds 5]

Then PPO's own sampling by `../ppo/rollout.py`: 16 responses of 64 tokens, each engine and transformers' `generate` in a
process of its own, by turns.
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
from clients import requests
from common import PPO, Record, bases, median, options, random_adapters, table
from work import Work, result_of

from align.models.actors import AdapterPool
from align.models.load import load_base, load_tokenizer
from align.rollout.hf import HfEngine
from align.rollout.multi_adapter import BankEngine
from align.run import Base

HERE = Path(__file__).resolve().parent
ADAPTERS, BAR = 8, 1.35
SAMPLERS = ("generate", "ours", "bank")


def together(base: Base, rows: int, tokens: int, rounds: int, folder: Path) -> dict[str, float]:
    """Seconds of one call, by engine and by how many adapters its rows have."""
    pool = AdapterPool(load_base(base, "lora", torch.device("cpu"), torch.float32))
    actors = [pool.actor(pool.add(each)) for each in random_adapters(base, ADAPTERS, (16,), folder)]
    pad_id = load_tokenizer(base).pad_token_id
    engines = {"bank": BankEngine((), pad_id, tokens, max_rank=16), "hf": HfEngine((), pad_id, tokens)}
    asked = requests((None,), 0)
    prompts = [next(asked).ids for _ in range(rows)]
    many, one = [actors[row % ADAPTERS] for row in range(rows)], [actors[0]] * rows
    cases: dict[str, Callable[[], object]] = {}
    for name, engine in engines.items():
        engine.load(base, "lora", torch.float32)
        for label, who in (("8 adapters", many), ("one adapter", one)):
            cases[f"{name}, {label}"] = lambda engine=engine, who=who: engine.generate(prompts, who, range(rows))
    found = by_turns(cases, rounds)
    for engine in engines.values():
        engine.close()
    return found


def by_turns(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    took: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            began = time.perf_counter()
            case()
            if number:  # the first round warms up
                took[name].append(time.perf_counter() - began)
    return {name: median(each, 3) for name, each in took.items()}


def sampled_for_ppo(model: str, dtype: str, threads: int, rounds: int) -> dict[str, float]:
    """Responses a second of each sampler."""
    work = Work(model, 16, 64, 1, 4, dtype)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{PPO}:{HERE.parents[1]}"}
    found: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for _ in range(rounds):
        for name in SAMPLERS:
            told = result_of([sys.executable, str(PPO / "rollout.py"), work.text(), name])
            found[name].append(told["samples_per_s"])
    return {name: median(each) for name, each in found.items()}


def format_table(found: dict[str, Any]) -> str:
    """The tables of README.md."""
    rows, sampled = [], []
    for name, row in found["rows"].items():
        if "generate" in row:
            ratios = (f"{row[each]:.2f}: {row[each] / row['generate']:.2f}" for each in ("ours", "bank"))
            sampled.append([name, f"{row['generate']:.2f}", *ratios])
            continue
        cells = [name]
        for engine, bar in (("bank", f" (≤ {BAR:g})"), ("hf", "")):
            one, many = (row[f"{engine}, {what}"] for what in ("one adapter", "8 adapters"))
            cells += [f"{one:.2f}", f"{many:.2f}", f"{many / one:.2f}{bar}"]
        rows.append(cells)
    columns = ("s", "bank, one adapter", "bank, 8", "ratio", "hf, one adapter", "hf, 8", "ratio")
    sampling = ("responses a second", "`generate`", "`rollout.engine=hf`", "`rollout.engine=bank`")
    return table(columns, rows) + "\n" + table(sampling, sampled)


def main() -> None:
    parser = options(__doc__, 5, HERE / "rollouts.json")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtypes", default="bfloat16", help="of PPO's sampling; empty to leave it out")
    given = parser.parse_args()
    record = Record(given)
    for name, base in bases(given.models).items():
        label = Path(name).name
        with tempfile.TemporaryDirectory() as folder:
            found = together(base, given.rows, given.tokens, given.rounds, Path(folder))
        record.add(f"{label} fp32, {given.rows} rows", found)
        gc.collect()
        for dtype in filter(None, given.dtypes.split(",")):
            record.add(f"{label} {dtype}", sampled_for_ppo(name, dtype, given.threads, min(given.rounds, 3)))
    print("\n" + format_table(record.found))


if __name__ == "__main__":
    sys.exit(main())
