"""Start the frontier's runs, each in a process of its own and only once, and record their processor time."""

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

from outcomes import BEST_OF
from training_methods import (
    SHARED_STAGES,
    TUNING_SEED,
    Method,
    build_best_of_overrides,
    build_shared_overrides,
    read_recipe_overrides,
)

from align.evals.suite.samples import Sample, read_samples
from align.run import resolve

LIVE_MEMORY_SCRIPT = Path(__file__).resolve().parent / "live_memory.py"
BEST_OF_RUN = "best-of-64"
RECIPE_RUN = "quickstart"
"""The name of the runs of the recipe's own PPO."""


class Runs:
    """A folder of runs for each seed. Runs that are finished are not made again.

    Attributes:
        root: holds the folders of the seeds.
        dtype: of all runs.
    """

    def __init__(self, root: Path, dtype: str) -> None:
        self.root = root.resolve()
        self.dtype = dtype

    def run_stage(self, seed: int, *overrides: str, name: str = "") -> None:
        """Run a stage.

        Args:
            name: of the run. Its processor time is recorded under this name, and a recorded run is skipped. Without a
                name nothing is recorded or skipped.
        """
        seconds_path = self.root / str(seed) / "took" / f"{name}.json"
        if name and seconds_path.exists():
            return
        run_name = [f"run.name={name}"] if name else []
        seconds = run_python("-m", "align", *build_shared_overrides(self.root, seed, self.dtype), *overrides, *run_name)
        if name:
            seconds_path.parent.mkdir(parents=True, exist_ok=True)
            seconds_path.write_text(json.dumps(seconds))

    def measure_live_memory(self, method: Method) -> None:
        """Record the peak of live tensors, in MB, in a run of a few steps."""
        megabytes_path = self.live_memory_path(method)
        if megabytes_path.exists():
            return
        megabytes_path.parent.mkdir(exist_ok=True)
        overrides = method.build_overrides(method.learning_rates[0], method.kl_values[0], short=True)
        run_python(
            str(LIVE_MEMORY_SCRIPT),
            str(megabytes_path),
            *build_shared_overrides(self.root, TUNING_SEED, self.dtype),
            *overrides,
            f"run.name=alive-{method.name.lower()}",
        )

    def live_memory_path(self, method: Method) -> Path:
        return self.root / "alive" / f"{method.name}.json"

    def run_shared_stages(self, seed: int) -> None:
        """Make the supervised model, the rankings and the reward model of a seed."""
        for stage in SHARED_STAGES:
            self.run_stage(seed, *read_recipe_overrides(stage, seed))

    def train_policy(self, seed: int, method: Method, learning_rate: str, kl_value: str) -> None:
        """Train a policy and evaluate it."""
        name = method.run_name(learning_rate, kl_value)
        self.run_stage(seed, *method.build_overrides(learning_rate, kl_value), name=name)
        self.evaluate(seed, f"{method.stage}:{name}", name)

    def train_recipe_policy(self, seed: int) -> None:
        self.run_stage(seed, *read_recipe_overrides("ppo", seed), name=RECIPE_RUN)
        self.evaluate(seed, f"ppo:{RECIPE_RUN}", RECIPE_RUN)

    def evaluate(self, seed: int, artifact: str, name: str, *overrides: str) -> None:
        """Evaluate an artifact, in a run of this name."""
        if not (self.root / str(seed) / "eval" / name / "manifest.json").exists():
            self.run_stage(seed, "stage=eval", f"artifact={artifact}", *overrides, f"run.name={name}")

    def sample_best_of_n(self, seed: int) -> None:
        """Run best-of-n on the prompts of the evaluations."""
        rows = [
            json.dumps({"messages": [message.as_dict() for message in sample.prompt]})
            for sample in self.load_samples(seed)
        ]
        prompts_path = self.root / str(seed) / "prompts.jsonl"
        prompts_path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        self.run_stage(seed, *build_best_of_overrides(max(BEST_OF), prompts_path), name=BEST_OF_RUN)

    def subfolder(self, name: str) -> Runs:
        """Return a folder of runs for supervised and reward models that must not become `latest` in this one."""
        return Runs(self.root / name, self.dtype)

    def latest_run_path(self, seed: int, stage: str) -> Path:
        """Return the folder of the latest run of a stage, such as the supervised model that methods start from."""
        return resolve(f"{stage}:latest", self.root / str(seed)).path.parent

    def load_samples(self, seed: int) -> list[Sample]:
        """Load the samples of the evaluation of the recipe's PPO."""
        return read_samples(self.root / str(seed) / "eval" / RECIPE_RUN / "artifact" / "samples.jsonl")


def run_python(*arguments: str) -> float:
    """Run Python with these arguments and return the process's processor seconds.

    Raises:
        CalledProcessError: the process failed.
    """
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return usage.ru_utime + usage.ru_stime


def run_in_parallel(jobs: int, task: Callable[..., object], argument_lists: Iterable[Sequence[Any]]) -> None:
    """Call a task with each list of arguments, in as many threads as there are jobs."""
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(task, *arguments) for arguments in argument_lists]:
            future.result()


def build_parser(description: str | None, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts of this folder have.

    Args:
        seeds: default of `--seeds`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine multiplies it by itself")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; give each a thread: OMP_NUM_THREADS=1")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="to report on")
    return parser


def round_figures(value: Any) -> Any:
    """Round every float in nested lists and dicts to four digits."""
    if isinstance(value, dict):
        return {key: round_figures(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round_figures(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
