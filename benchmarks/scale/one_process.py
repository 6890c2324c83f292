"""What several ranks cost a run of one process: the same commands in this checkout and in an older one, in turns.

    python benchmarks/scale/one_process.py OLDER [--rounds 10] [--save one_process.json]

OLDER is a checkout, such as `git worktree add ../older COMMIT`. PPO and SFT of the built-in model, in fp32 on one
thread; seconds of an update and of a step are medians over rounds, the first update or step of a run left out. Their
metrics have to be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HERE))

from align.track import read_rows  # noqa: E402

START = ("stage=sft", "run.name=s", "stage.max_steps=2", "stage.eval_size=8")
LINES = {
    "sft": ("stage=sft", "stage.max_steps=12", "stage.eval_size=8", "stage.log_every=1", "stage.batch_size=16"),
    "ppo": (
        "stage=ppo", "init=sft:s", "reward=sentiment", "stage.updates=5", "stage.batch_size=32", "stage.micro_batch=16",
        "stage.normalise_on=32", "rollout.max_new_tokens=24",
    ),
}  # fmt: skip


def ran(checkout: Path, folder: Path, words: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "align", *words]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def steps(run: Path) -> list[float]:
    """Seconds of each step but the first, by the clock that is written at its end."""
    ends = [row["elapsed_s"] for row in read_rows(run / "timing.jsonl")]
    return [after - before for before, after in pairwise(ends)]


def compare(older: Path, rounds: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sides = {"older": older, "this": HERE}
    for name, checkout in sides.items():
        (folder / name).mkdir()
        ran(checkout, folder / name, START)
    for stage, words in LINES.items():
        medians: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sorted(sides, reverse=bool(number % 2)):
                ran(sides[name], folder / name, (*words, f"run.name=r{number}"))
                medians[name].append(statistics.median(steps(folder / name / "runs" / stage / f"r{number}")))
        last = [(folder / name / "runs" / stage / "r0" / "metrics.jsonl").read_text() for name in sides]
        middle = {name: statistics.median(values) for name, values in medians.items()}
        found[stage] = {
            "seconds": middle, "ratio": middle["this"] / middle["older"], "same_metrics": last[0] == last[1],
            "rounds": medians,
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
