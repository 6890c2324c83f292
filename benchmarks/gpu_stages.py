"""Measure every stage on one GPU by its command line: seconds, peak memory with the prediction of `stage=plan`, and
tokens a second of PPO's rollouts by each engine; then PPO on one rank under torch.distributed, and on two GPUs.

    python benchmarks/gpu_stages.py [--sizes 0.5B] [--device cuda] [--vllm PYTHON] [--save gpu.json]

Weights are random and rows are made up: no network is needed, and losses and scores mean nothing. Runs that this
version of align or this machine cannot do are skipped with a line. `--sizes tiny --device cpu` tries the script without
a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import CONFIGS, save_random_model

from align.config.groups import RolloutConfig
from align.config.stages import STAGES
from align.run import read_manifest
from align.track import read_rows

ROWS = 64
TRAINING_STEPS = ("stage.batch_size=8", "stage.micro_batch=8", "stage.epochs=1")
PAIR_SPLITS = ("stage.held_out=0.2", "data.held_out=0")


class RolloutSize(NamedTuple):
    """Answers an update of PPO, and maximum new tokens of each."""

    batch: int
    tokens: int


def write_rows(folder: Path) -> dict[str, list[str]]:
    """Write made-up conversations and preference pairs. Returns the overrides that select `chats` and `pairs`."""
    questions = [{"role": "user", "content": f"Tell me about thing number {i}, at some length."} for i in range(ROWS)]
    long_answer = [{"role": "assistant", "content": "It is a fine thing. " * 40}]
    short_answer = [{"role": "assistant", "content": "No."}]
    rows_by_kind = {
        "chats": [{"messages": [question, *long_answer]} for question in questions],
        "pairs": [
            {"chosen": [question, *long_answer], "rejected": [question, *short_answer]} for question in questions
        ],
    }
    for kind, rows in rows_by_kind.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{kind}.jsonl").write_text(text, encoding="utf-8")
    return {kind: ["data=files", f"data.path={folder / kind}.jsonl"] for kind in rows_by_kind}


def build_stage_overrides(folder: Path, size: RolloutSize) -> dict[str, list[str]]:
    """Return stage → overrides, each stage after those whose results it needs."""
    data = write_rows(folder)
    base = ["model=hub", f"model.path={folder / 'model'}"]
    ppo = [
        "stage.updates=3",
        f"stage.batch_size={size.batch}",
        f"stage.micro_batch={min(8, size.batch)}",
        f"stage.normalise_on={size.batch}",
    ]
    return {
        "sft": [*base, *data["chats"], *TRAINING_STEPS, "stage.eval_size=8"],
        "full": [*base, *data["chats"], *TRAINING_STEPS, "stage.eval_size=8"],
        "reward": [*data["pairs"], *PAIR_SPLITS, *TRAINING_STEPS],
        "dpo": [*data["pairs"], *PAIR_SPLITS, *TRAINING_STEPS],
        "sample": [*data["chats"], "stage.prompts=8", "stage.candidates=2"],
        "ppo": [*data["chats"], *ppo],
        "eval": [*data["chats"], "stage.prompts=8"],
        "verify": [*data["chats"]],
    }


class StageRunner:
    """Runs stages in processes of their own, in one `run.root`."""

    def __init__(self, folder: Path, device: str, size: RolloutSize) -> None:
        self.root = folder / "runs"
        self.device = device
        self.size = size

    def build_command_line(self, stage: str, *overrides: str) -> list[str]:
        return [
            f"stage={stage}",
            *overrides,
            f"rollout.max_new_tokens={self.size.tokens}",
            f"run.root={self.root}",
        ]

    def measure(self, name: str, command_line: list[str], launcher: tuple[str, ...] = ()) -> dict[str, Any] | None:
        """Run a command line and return its seconds, peak memory and rollout tokens a second. If it fails, print why
        and return None.

        Args:
            name: of the run.
            launcher: arguments of Python before `-m align`.
        """
        started = time.perf_counter()
        command = [sys.executable, *launcher, "-m", "align", *command_line, f"device={self.device}", f"run.name={name}"]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            last_line = (process.stderr.strip().splitlines() or ["nothing said"])[-1][:200]
            print(f"{name}: status {process.returncode}: {last_line}")
            return None
        folder = Path(process.stdout.strip().splitlines()[-1])
        metrics = read_manifest(folder).metrics
        timings = read_rows(folder / "timing.jsonl")
        rates = [row["rollout_tok_s"] for row in timings[1:] if "rollout_tok_s" in row]
        return {
            "seconds": time.perf_counter() - started,
            "peak_mb": metrics.get("peak_gpu_mb", metrics.get("peak_rss_mb")),
            **({"rollout_tok_s": statistics.median(rates)} if rates else {}),
        }

    def predict(self, stage: str, command_line: list[str]) -> str:
        """Return what `stage=plan` prints for a stage, with a measured micro-batch. Empty if it has no plan."""
        if "plan" not in STAGES:
            return ""
        plan = ["stage=plan", f"stage.of={stage}", "stage.measure=true", *command_line[1:], f"device={self.device}"]
        process = subprocess.run([sys.executable, "-m", "align", *plan], capture_output=True, text=True)
        return process.stdout if process.returncode == 0 else ""


def iter_ppo_variants(options: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """Yield name, launcher and further overrides of PPO with vLLM, on one rank and on two GPUs. Print a line for each
    that is skipped."""
    engines = RolloutConfig.__dataclass_fields__["engine"].metadata.get("choices", ())
    if "vllm" not in engines or not options.vllm:
        print("ppo by vllm: skipped (this align has no rollout=vllm, or --vllm names no python that has vLLM)")
    else:
        yield "ppo-vllm", (), ["rollout=vllm", f"rollout.python={options.vllm}"]
    if find_spec("align.ranks") is None:
        print("ppo on ranks: skipped (this align has no devices=)")
        return
    yield "ppo-one-rank", ("-m", "torch.distributed.run", "--nproc-per-node=1"), []
    if torch.cuda.device_count() < 2:
        print("ppo on two GPUs: skipped (this machine has fewer)")
    else:
        yield "ppo-two", (), ["devices=2"]


def measure_size(model_size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run all stages with a model of this size. Returns name of a run → row, None for a run that failed."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder)
        save_random_model(model_size, folder / "model", options.device)
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        rollout_size = RolloutSize(options.batch, options.tokens)
        runner = StageRunner(folder, options.device, rollout_size)
        stage_overrides = build_stage_overrides(folder, rollout_size)
        for stage in options.stages.split(","):
            command_line = runner.build_command_line(stage, *stage_overrides[stage])
            figures = runner.measure(stage, command_line)
            rows[stage] = print_row(stage, figures, runner.predict(stage, command_line))
        if "ppo" in rows:
            command_line = runner.build_command_line("ppo", *stage_overrides["ppo"])
            for name, launcher, overrides in iter_ppo_variants(options):
                rows[name] = print_row(name, runner.measure(name, [*command_line, *overrides], launcher))
    return rows


def print_row(name: str, figures: dict[str, Any] | None, plan: str = "") -> dict[str, Any] | None:
    """Print a row and return it with its plan. Returns None if the run failed."""
    if figures is None:
        return None
    rate = f"{figures['rollout_tok_s']:>12.0f}" if "rollout_tok_s" in figures else ""
    print(f"{name:<14}{figures['seconds']:>10.1f}{figures['peak_mb']:>10.0f}{rate}", flush=True)
    if not plan:
        return figures
    print("".join(f"    {line}\n" for line in plan.splitlines()), end="", flush=True)
    return {**figures, "plan": plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.5B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--stages", default="sft,full,reward,dpo,sample,ppo,eval,verify")
    parser.add_argument("--vllm", help="a Python that has vLLM")
    parser.add_argument("--save", type=Path, help="gpu.json writes gpu_stages.json")
    options = parser.parse_known_args()[0]  # gpu.sh gives gpu.py's options to this script too
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; `--sizes tiny --device cpu` tries the script without one")
    gpu_name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    rows_by_size = {}
    for model_size in options.sizes.split(","):
        assert model_size in CONFIGS, f"--sizes: {model_size} is none of {', '.join(CONFIGS)}"
        print(f"{gpu_name}, {model_size}\n{'stage':<14}{'seconds':>10}{'peak MB':>10}{'rollout tok/s':>14}")
        rows_by_size[model_size] = measure_size(model_size, options)
    if options.save:
        stages_path = options.save.with_name(f"{options.save.stem}_stages.json")
        stages_path.write_text(json.dumps({"card": gpu_name, "rows": rows_by_size}, indent=2) + "\n")


if __name__ == "__main__":
    main()
