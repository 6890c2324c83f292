"""Runs of the frontier: each in a process of its own, made once, with what it took noted beside it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compared import MADE_FIRST, TUNED_ON, Method, best_of, common, of_recipe
from outcomes import BEST_OF

from align.evals.suite.samples import Sample, read_samples
from align.run import resolve

ALIVE = Path(__file__).resolve().parent / "alive.py"
BEST = "best-of-64"
RECIPE = "quickstart"
"""The name of the runs of the recipe's own PPO."""


class Runs:
    """Makes runs, each in a process of its own, and notes what it took.

    Attributes:
        root: a folder of runs for each seed.
    """

    def __init__(self, root: Path, dtype: str) -> None:
        self.root, self.dtype = root.resolve(), dtype

    def make(self, seed: int, *words: str, name: str = "") -> None:
        """One run, unless it is there; one with a name has its processor's seconds noted beside it."""
        noted = self.root / str(seed) / "took" / f"{name}.json"
        if name and noted.exists():
            return
        named = [f"run.name={name}"] if name else []
        seconds = ended("-m", "align", *common(self.root, seed, self.dtype), *words, *named)
        if name:
            noted.parent.mkdir(parents=True, exist_ok=True)
            noted.write_text(json.dumps(seconds))

    def alive(self, method: Method) -> None:
        """MB of tensors in a run of a few steps."""
        noted = self.root / "alive" / f"{method.name}.json"
        if noted.exists():
            return
        noted.parent.mkdir(exist_ok=True)
        words = method.line(method.rates[0], method.prices[0], short=True)
        name = f"run.name=alive-{method.name.lower()}"
        ended(str(ALIVE), str(noted), *common(self.root, TUNED_ON, self.dtype), *words, name)

    def first(self, seed: int) -> None:
        """What all methods of a seed start from."""
        for stage in MADE_FIRST:
            self.make(seed, *of_recipe(stage, seed))

    def policy(self, seed: int, method: Method, rate: str, price: str) -> None:
        """A policy and its evaluation."""
        name = method.run_name(rate, price)
        self.make(seed, *method.line(rate, price), name=name)
        self.judged(seed, f"{method.stage}:{name}", name)

    def recipe(self, seed: int) -> None:
        self.make(seed, *of_recipe("ppo", seed), name=RECIPE)
        self.judged(seed, f"ppo:{RECIPE}", RECIPE)

    def judged(self, seed: int, artifact: str, name: str, *words: str) -> None:
        """The evaluation of a run, which has its name."""
        if not (self.root / str(seed) / "eval" / name / "manifest.json").exists():
            self.make(seed, "stage=eval", f"artifact={artifact}", *words, f"run.name={name}")

    def best(self, seed: int) -> None:
        """Best-of-n on the prompts of the evaluations."""
        rows = [json.dumps({"messages": [m.as_dict() for m in s.prompt]}) for s in self.samples(seed)]
        path = self.root / str(seed) / "prompts.jsonl"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        self.make(seed, *best_of(max(BEST_OF), path), name=BEST)

    def apart(self, name: str) -> Runs:
        """A place for supervised and reward models that the methods here must not take for the latest."""
        return Runs(self.root / name, self.dtype)

    def latest(self, seed: int, stage: str) -> Path:
        """The folder of the run that a seed's methods start from, or are rewarded by."""
        return resolve(f"{stage}:latest", self.root / str(seed)).path.parent

    def samples(self, seed: int) -> list[Sample]:
        """Of an evaluation that every seed has."""
        return read_samples(self.root / str(seed) / "eval" / RECIPE / "artifact" / "samples.jsonl")


def ended(*words: str) -> float:
    """Processor seconds of a command of Python's."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return used.ru_utime + used.ru_stime


def side_by_side(jobs: int, task: Callable[..., object], given: Iterable[Sequence[Any]]) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(task, *each) for each in given]:
            done.result()


def arguments(about: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """What every script here is told.

    Args:
        seeds: that are reported on, unless it is told others.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine multiplies it by itself")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; give each a thread: OMP_NUM_THREADS=1")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="to report on")
    return parser


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value
