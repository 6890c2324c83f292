"""Measure what support for several ranks costs a run of one process: this checkout and an older one, by turns.

    python benchmarks/scale/single_process_cost.py OLDER [--rounds 10] [--save one_process.json]

OLDER is a checkout, such as `git worktree add ../older COMMIT`. PPO and SFT of the built-in model run in fp32 on one
thread. The processor seconds of a step are the seconds of a long run minus those of a short one, divided by the steps
between, so that imports and other work on the machine are not counted. Medians over rounds; metrics have to be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE_RUN = ("stage=sft", "run.name=s", "stage.max_steps=2", "stage.eval_size=8")
"""Arguments of the run that `ppo` starts from."""
STAGES = {
    "sft": ("stage=sft", "stage.eval_size=8", "stage.log_every=1", "stage.batch_size=16"),
    "ppo": (
        *("stage=ppo", "init=sft:s", "reward=sentiment", "stage.batch_size=32", "stage.micro_batch=16"),
        *("stage.normalise_on=32", "rollout.max_new_tokens=24"),
    ),
}
"""Stage → arguments of its command line."""
STEPS = {"sft": ("stage.max_steps", 2, 12), "ppo": ("stage.updates", 1, 4)}
"""Stage → the key of its number of steps, and the numbers of the short and of the long run."""


def measure_cpu_seconds(checkout: Path, folder: Path, arguments: tuple[str, ...]) -> float:
    """Run `python -m align` of a checkout in a folder. Returns its processor seconds."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "align", *arguments]
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


def compare_checkouts(older: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the processor seconds of a step by stage and checkout."""
    results: dict[str, Any] = {}
    checkouts = {"older": older, "this": ROOT}
    for name, checkout in checkouts.items():
        (folder / name).mkdir()
        measure_cpu_seconds(checkout, folder / name, BASE_RUN)
    for stage, arguments in STAGES.items():
        key, short, long = STEPS[stage]
        step_seconds: dict[str, list[float]] = {name: [] for name in checkouts}
        for number in range(rounds):
            for name in sorted(checkouts, reverse=bool(number % 2)):
                short_s, long_s = (
                    measure_cpu_seconds(
                        checkouts[name],
                        folder / name,
                        (*arguments, f"{key}={steps}", f"run.name=r{number}-{steps}"),
                    )
                    for steps in (short, long)
                )
                step_seconds[name].append((long_s - short_s) / (long - short))
            print(stage, number, {name: round(values[-1], 3) for name, values in step_seconds.items()}, flush=True)
        metrics = [(folder / name / "runs" / stage / f"r0-{long}" / "metrics.jsonl").read_text() for name in checkouts]
        medians = {name: statistics.median(values) for name, values in step_seconds.items()}
        pairs = zip(step_seconds["this"], step_seconds["older"], strict=True)
        results[stage] = {
            "processor_s": medians,
            "ratio": medians["this"] / medians["older"],
            "ratio_of_rounds": statistics.median(new / old for new, old in pairs),
            "same_metrics": metrics[0] == metrics[1],
            "rounds": step_seconds,
        }
        print(stage, json.dumps({key: value for key, value in results[stage].items() if key != "rounds"}), flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path, help="a checkout of an older commit")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--save", type=Path, help="the JSON file of the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="align-one-") as scratch:
        results = compare_checkouts(options.older.resolve(), options.rounds, Path(scratch))
    if options.save:
        machine = {"processor": platform.machine(), "cpus": len(os.sched_getaffinity(0))}
        options.save.write_text(json.dumps({"machine": machine, "stages": results}, indent=2) + "\n")
