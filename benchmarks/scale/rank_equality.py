"""Compare runs on two ranks with runs of one process: the same commands, and how far metrics and weights differ.

    python benchmarks/scale/rank_equality.py [--cases sft,ppo] [--kills 10] [--save equal.json]

One process takes two micro-batches per optimizer step and two ranks take one each, in fp32 on a CPU, with the built-in
model and an epoch whose last step is short. With `--kills N`, a rank of a stage is killed (SIGKILL) N times at a random
moment, and the run is continued by one process or two ranks in turn. Ranks are forked and get the environment variables
that a launcher would set, so that none of them has to import torch again. Takes a quarter of an hour on two busy CPU
cores with ten kills.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]

import torch  # noqa: E402
from processes import Forks, run_fork_server  # noqa: E402  # pyright: ignore[reportMissingImports]
from rank_processes import start_ranks  # noqa: E402  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file  # noqa: E402

from align.track import read_rows  # noqa: E402

MODEL = ("model=pocket", "method=lora", "device=cpu", "data=files", "seed=1", "data.max_length=64")
BATCHES = ("stage.batch_size=8", "stage.micro_batch=4", "stage.save_every=2")
SUPERVISED = (*MODEL, *BATCHES, "stage.log_every=1", "stage.epochs=2", "stage.warmup=0.2")
PPO = (
    *(*MODEL, *BATCHES, "data.path=talk.jsonl", "init=sft:sft-one", "reward.ref=reward:reward-one"),
    *("stage.updates=6", "stage.minibatches=1", "rollout.max_new_tokens=8", "rollout.batch_size=4"),
    "stage.normalise_on=8",
)
CASES = {
    "sft": (*SUPERVISED, "data.path=talk.jsonl", "data.held_out=0.2", "stage.eval_every=3", "stage.lr=1e-3"),
    "reward": (*SUPERVISED, "data.path=pairs.jsonl", "stage.held_out=0.2", "init=sft:sft-one", "stage.lr=1e-3"),
    "dpo": (*SUPERVISED, "data.path=pairs.jsonl", "stage.held_out=0.2", "init=sft:sft-one", "stage.lr=1e-3"),
    "full": (*SUPERVISED, "method=full", "data.path=talk.jsonl", "data.held_out=0.2", "stage.lr=1e-4"),
    "ppo": PPO,
    "ppo-bf16": (*PPO, "dtype=bfloat16"),
    "ppo-micro": (*PPO, "stage.micro_batch=1"),  # four micro-batches a rank are summed in another order
}
"""Case → arguments of its command line. A case's stage is its name up to the hyphen."""
ROWS = 38
EXIT_TIMEOUT_S = 60.0


def write_data(folder: Path) -> None:
    """Write rows of different lengths, in a number that makes the last step of an epoch short."""
    draw = random.Random(0)
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "went", "to", "see", "what", "dog", "had")

    def draw_message(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(2, 9)))}

    prompts = [draw_message("user") for _ in range(ROWS)]
    talk = [{"messages": [prompt, draw_message("assistant")]} for prompt in prompts]
    pairs = [
        {"prompt": [prompt], "chosen": [draw_message("assistant")], "rejected": [draw_message("assistant")]}
        for prompt in prompts
    ]
    for name, rows in (("talk", talk), ("pairs", pairs)):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def run_to_end(forks: Forks, folder: Path, arguments: Sequence[str], world: int) -> None:
    for child in start_ranks(forks, folder, *arguments, world=world):
        result = child.wait()
        if result.status:
            raise SystemExit(f"{' '.join(arguments)} on {world}: {result}")


def run_and_kill(
    forks: Forks, folder: Path, arguments: Sequence[str], metrics: Path, step: int, wait_s: float, rank: int
) -> str:
    """Kill one of two ranks some seconds after a step's row is in the metrics. Returns how the other rank ended."""
    children = start_ranks(forks, folder, *arguments, world=2)
    while not metrics.exists() or len(read_rows(metrics)) < step:
        if children[0].poll() is not None:
            raise SystemExit(f"ended before it was killed: {children[0].wait()}")
        time.sleep(0.01)
    time.sleep(wait_s)
    os.kill(children[rank].pid, signal.SIGKILL)
    survivor = children[1 - rank].wait(EXIT_TIMEOUT_S)
    children[rank].wait()
    return f"status {survivor.status}"


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Return how far the metrics and weights of two runs differ."""
    first_rows, second_rows = (read_rows(folder / "metrics.jsonl") for folder in (first, second))
    first_tensors, second_tensors = (load_tensors(folder / "artifact") for folder in (first, second))
    assert first_tensors.keys() == second_tensors.keys(), "the runs have different tensors"
    first_keys, second_keys = ([row.keys() for row in rows] for rows in (first_rows, second_rows))
    assert first_keys == second_keys, "the runs have different metrics"
    return {
        "metrics_equal": first_rows == second_rows,
        "figures": compute_largest_differences(first_rows, second_rows),
        "tensors": len(first_tensors),
        "tensors_equal": sum(torch.equal(tensor, second_tensors[key]) for key, tensor in first_tensors.items()),
        "weights_off": max(
            float((tensor.float() - second_tensors[key].float()).abs().max()) for key, tensor in first_tensors.items()
        ),
    }


def load_tensors(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Return the tensors of all safetensors files in a folder, by relative path and name."""
    return {
        (str(path.relative_to(folder)), name): tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def compute_largest_differences(
    first_rows: Sequence[Mapping[str, Any]], second_rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the largest relative difference of each metric that differs."""
    largest: dict[str, float] = {}
    for first, second in zip(first_rows, second_rows, strict=True):
        for name, value in first.items():
            if value != second[name]:
                difference = abs(value - second[name]) / max(abs(value), 1e-12)
                largest[name] = max(largest.get(name, 0.0), difference)
    return largest


def add_required_cases(cases: Sequence[str]) -> list[str]:
    """Return the cases in the order in which they can run, with the cases whose runs they start from."""
    needs_models = any(case.partition("-")[0] in ("dpo", "ppo", "reward") for case in cases)
    return [case for case in CASES if case in cases or (needs_models and case in ("sft", "reward"))]


def compare_cases(cases: Sequence[str], kills: int, folder: Path) -> dict[str, Any]:
    """Compare two ranks with one process, and killed runs with uninterrupted ones. Returns results by case."""
    write_data(folder)
    draw = random.Random(1)
    results: dict[str, Any] = {}

    def build_arguments(case: str, name: str) -> list[str]:
        return [f"stage={case.partition('-')[0]}", *CASES[case], f"run.name={case}-{name}"]

    def locate_run(case: str, name: str) -> Path:
        return folder / "runs" / case.partition("-")[0] / f"{case}-{name}"

    with run_fork_server() as forks:
        for case in add_required_cases(cases):
            for name, world in (("one", 1), ("two", 2)):
                run_to_end(forks, folder, build_arguments(case, name), world)
            results[case] = compare_runs(locate_run(case, "one"), locate_run(case, "two"))
            print(case, json.dumps(results[case]), flush=True)
        exact_cases = [case for case in cases if case != "ppo-micro"]
        for number in range(kills):
            case = exact_cases[number % len(exact_cases)]
            world = 1 + number // len(exact_cases) % 2
            rank = draw.randrange(2)
            arguments = build_arguments(case, f"killed-{number}")
            killed_folder = locate_run(case, f"killed-{number}")
            uninterrupted_folder = locate_run(case, "one" if case != "full" else "two")
            step = draw.randint(1, len(read_rows(uninterrupted_folder / "metrics.jsonl")) - 2)
            wait_s = draw.uniform(0, 0.2)
            survivor = run_and_kill(forks, folder, arguments, killed_folder / "metrics.jsonl", step, wait_s, rank)
            run_to_end(forks, folder, arguments, world)
            kill = {"rank": rank, "after_row": step, "the_other": survivor, "continued_on": world}
            results[case].setdefault("killed", []).append(kill | compare_runs(uninterrupted_folder, killed_folder))
            print(case, json.dumps(results[case]["killed"][-1]), flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="separated by commas")
    parser.add_argument("--kills", type=int, default=0, help="number of kills; the cases take turns")
    parser.add_argument("--save", type=Path, help="the JSON file of the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="align-equal-") as scratch:
        results = compare_cases(options.cases.split(","), options.kills, Path(scratch))
    if options.save:
        machine = {"processor": platform.machine(), "cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__}
        options.save.write_text(json.dumps({"machine": machine, "cases": results}, indent=2) + "\n")
