"""What several ranks cost a run of one process: the same commands in this checkout and in an older one, in turns.

    python benchmarks/scale/one_process.py OLDER [--rounds 10] [--save one_process.json]

OLDER is a checkout, such as `git worktree add ../older COMMIT`. PPO and SFT of the built-in model, in fp32 on one
thread. The processor seconds of a step are those of a long run less those of a short one, over the steps between, so
that neither imports nor other work on the machine are counted. Medians over rounds; metrics have to be the same.
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

HERE = Path(__file__).resolve().parents[2]
START = ("stage=sft", "run.name=s", "stage.max_steps=2", "stage.eval_size=8")
LINES = {
    "sft": ("stage=sft", "stage.eval_size=8", "stage.log_every=1", "stage.batch_size=16"),
    "ppo": (
        "stage=ppo", "init=sft:s", "reward=sentiment", "stage.batch_size=32", "stage.micro_batch=16",
        "stage.normalise_on=32", "rollout.max_new_tokens=24",
    ),
}  # fmt: skip
STEPS = {"sft": ("stage.max_steps", 2, 12), "ppo": ("stage.updates", 1, 4)}
"""The key, and the steps of the short and of the long run."""


def seconds(checkout: Path, folder: Path, words: tuple[str, ...]) -> float:
    """Processor seconds of a command."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "align", *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(older: Path, rounds: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sides = {"older": older, "this": HERE}
    for name, checkout in sides.items():
        (folder / name).mkdir()
        seconds(checkout, folder / name, START)
    for stage, words in LINES.items():
        key, short, long = STEPS[stage]
        each: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                took = [
                    seconds(sides[name], folder / name, (*words, f"{key}={steps}", f"run.name=r{number}-{steps}"))
                    for steps in (short, long)
                ]
                each[name].append((took[1] - took[0]) / (long - short))
            print(stage, number, {name: round(values[-1], 3) for name, values in each.items()}, flush=True)
        last = [(folder / name / "runs" / stage / f"r0-{long}" / "metrics.jsonl").read_text() for name in sides]
        middle = {name: statistics.median(values) for name, values in each.items()}
        found[stage] = {
            "processor_s": middle, "ratio": middle["this"] / middle["older"],
            "ratio_of_rounds": statistics.median(a / b for a, b in zip(each["this"], each["older"], strict=True)),
            "same_metrics": last[0] == last[1], "rounds": each,
        }  # fmt: skip
        print(stage, json.dumps({key: value for key, value in found[stage].items() if key != "rounds"}), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path, help="a checkout of an older commit")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--save", type=Path, help="where to write the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="align-one-") as scratch:
        figures = compare(given.older.resolve(), given.rounds, Path(scratch))
    if given.save:
        machine = {"processor": platform.machine(), "cpus": len(os.sched_getaffinity(0))}
        given.save.write_text(json.dumps({"machine": machine, "stages": figures}, indent=2) + "\n")
