"""Every stage on one GPU, by its own command line: seconds, peak memory beside what `stage=plan` predicts, and tokens a
second of PPO's rollouts by each engine; the same on one rank under torch.distributed, and on two GPUs.

    python benchmarks/gpu_stages.py [--sizes 0.5B] [--device cuda] [--vllm PYTHON] [--save gpu.json]

Random weights and made-up rows: no network is needed, and no figure says anything of learning. What this version of
align or this machine lacks is said in a line and passed over. `--sizes tiny --device cpu` shows that the script works.
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
from gpu import CONFIGS, make_model

from align.config.groups import RolloutConfig
from align.config.stages import STAGES
from align.run import read_manifest
from align.track import read_rows

ROWS = 64
STEPS = ("stage.batch_size=8", "stage.micro_batch=8", "stage.epochs=1")
PAIRS = ("stage.held_out=0.2", "data.held_out=0")


class Size(NamedTuple):
    """How much is asked of PPO: answers an update, and tokens each."""

    batch: int
    tokens: int


def write_rows(folder: Path) -> dict[str, list[str]]:
    """Made-up conversations and pairs; the words that name each."""
    asked = [{"role": "user", "content": f"Tell me about thing number {i}, at some length."} for i in range(ROWS)]
    long, short = ([{"role": "assistant", "content": text}] for text in ("It is a fine thing. " * 40, "No."))
    kinds = {
        "chats": [{"messages": [one, *long]} for one in asked],
        "pairs": [{"chosen": [one, *long], "rejected": [one, *short]} for one in asked],
    }
    for name, rows in kinds.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: ["data=files", f"data.path={folder / name}.jsonl"] for name in kinds}


def commands(folder: Path, size: Size) -> dict[str, list[str]]:
    """Each stage's words, in the order in which one needs another."""
    data = write_rows(folder)
    base = ["model=hub", f"model.path={folder / 'model'}"]
    ppo = [
        "stage.updates=3",
        f"stage.batch_size={size.batch}",
        f"stage.micro_batch={min(8, size.batch)}",
        f"stage.normalise_on={size.batch}",
    ]
    return {
        "sft": [*base, *data["chats"], *STEPS, "stage.eval_size=8"],
        "full": [*base, *data["chats"], *STEPS, "stage.eval_size=8"],
        "reward": [*data["pairs"], *PAIRS, *STEPS],
        "dpo": [*data["pairs"], *PAIRS, *STEPS],
        "sample": [*data["chats"], "stage.prompts=8", "stage.candidates=2"],
        "ppo": [*data["chats"], *ppo],
        "eval": [*data["chats"], "stage.prompts=8"],
        "verify": [*data["chats"]],
    }


class Runner:
    """Runs align's command lines in processes of their own, in one `run.root`."""

    def __init__(self, folder: Path, device: str, size: Size) -> None:
        self.root, self.device, self.size = folder / "runs", device, size

    def words(self, stage: str, *words: str) -> list[str]:
        limits = [f"rollout.max_new_tokens={self.size.tokens}", f"run.root={self.root}"]
        return [f"stage={stage}", *words, *limits]

    def run(self, name: str, words: list[str], front: tuple[str, ...] = ()) -> dict[str, Any] | None:
        """What one run took; None, and a line that says why, where it failed."""
        began = time.perf_counter()
        command = [sys.executable, *front, "-m", "align", *words, f"device={self.device}", f"run.name={name}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(
                f"{name}: status {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1][:200]}"
            )
            return None
        folder = Path(done.stdout.strip().splitlines()[-1])
        metrics, rows = read_manifest(folder).metrics, read_rows(folder / "timing.jsonl")
        rates = [row["rollout_tok_s"] for row in rows[1:] if "rollout_tok_s" in row]
        return {
            "seconds": time.perf_counter() - began, "peak_mb": metrics.get("peak_gpu_mb", metrics.get("peak_rss_mb")),
            **({"rollout_tok_s": statistics.median(rates)} if rates else {}),
        }  # fmt: skip

    def predicted(self, stage: str, words: list[str]) -> str:
        """What `stage=plan` says before and beside one micro-batch; empty where there is no plan of it."""
        if "plan" not in STAGES:
            return ""
        asked = ["stage=plan", f"stage.of={stage}", "stage.measure=true", *words[1:], f"device={self.device}"]
        done = subprocess.run([sys.executable, "-m", "align", *asked], capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""


def beyond_one_process(given: argparse.Namespace) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """Name, launcher and words of PPO in other forms; a line for each that is passed over."""
    engines = RolloutConfig.__dataclass_fields__["engine"].metadata.get("choices", ())
    if "vllm" not in engines or not given.vllm:
        print("ppo by vllm: passed over (this align has no rollout=vllm, or --vllm names no python that has vLLM)")
    else:
        yield "ppo-vllm", (), ["rollout=vllm", f"rollout.python={given.vllm}"]
    if find_spec("align.ranks") is None:
        print("ppo on ranks: passed over (this align has no devices=)")
        return
    yield "ppo-one-rank", ("-m", "torch.distributed.run", "--nproc-per-node=1"), []
    if torch.cuda.device_count() < 2:
        print("ppo on two GPUs: passed over (this machine has fewer)")
    else:
        yield "ppo-two", (), ["devices=2"]


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The table of one size."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        make_model(name, folder / "model", given.device)
        if given.device.startswith("cuda"):
            torch.cuda.empty_cache()
        size = Size(given.batch, given.tokens)
        runner, lines = Runner(folder, given.device, size), commands(folder, size)
        for stage in given.stages.split(","):
            words = runner.words(stage, *lines[stage])
            rows[stage] = told(stage, runner.run(stage, words), runner.predicted(stage, words))
        if "ppo" in rows:
            for form, front, more in beyond_one_process(given):
                rows[form] = told(form, runner.run(form, [*runner.words("ppo", *lines["ppo"]), *more], front))
    return rows


def told(name: str, took: dict[str, Any] | None, plan: str = "") -> dict[str, Any] | None:
    """A row, printed."""
    if took:
        rate = f"{took['rollout_tok_s']:>12.0f}" if "rollout_tok_s" in took else ""
        print(f"{name:<14}{took['seconds']:>10.1f}{took['peak_mb']:>10.0f}{rate}", flush=True)
        if plan:
            print("".join(f"    {line}\n" for line in plan.splitlines()), end="", flush=True)
    return took and {**took, **({"plan": plan} if plan else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.5B")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--stages", default="sft,full,reward,dpo,sample,ppo,eval,verify")
    parser.add_argument("--vllm", help="a Python that has vLLM")
    parser.add_argument("--save", type=Path, help="gpu.json writes gpu_stages.json")
    given = parser.parse_known_args()[0]  # gpu.py has others
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; `--sizes tiny --device cpu` tries the script without one")
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    found = {}
    for name in given.sizes.split(","):
        assert name in CONFIGS, f"--sizes: {name} is none of {', '.join(CONFIGS)}"
        print(f"{card}, {name}\n{'stage':<14}{'seconds':>10}{'peak MB':>10}{'rollout tok/s':>14}")
        found[name] = measured(name, given)
    if given.save:
        beside = given.save.with_name(f"{given.save.stem}_stages.json")
        beside.write_text(json.dumps({"card": card, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
