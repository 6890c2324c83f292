"""What many systems cost an evaluation: eight adapters beside as many rows under one, and SmolLM2 on 200 prompts.

    python benchmarks/evals/systems.py [--rounds 3] [--save systems.json] [--only adapters|smollm2]

`adapters`: answers of eight adapters of the built-in model to N prompts each, and of one to 8·N, by `rollout=bank`;
processor seconds of a large run less those of a small one, so that neither imports nor loading are counted, and the
most memory. `smollm2`: 200 prompts of 64 tokens, seconds of the whole command. On a CPU, two threads.
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
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from align.run import read_manifest  # noqa: E402

EIGHT, PROMPTS, FEW, TOKENS = 8, 40, 4, 64
CHECK = {"kind": "regex", "pattern": "e"}


def ran(folder: Path, *words: str) -> tuple[float, float]:
    """Processor seconds and seconds of a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "align", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, took


def write_task(folder: Path, count: int) -> str:
    """So many prompts, and a file of answers that stands for a second system."""
    rows = [{"id": i, "prompt": f"Tell me something about the number {i}.", "check": CHECK} for i in range(count)]
    (folder / f"ask-{count}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    answers = "".join(f'{{"id": {i}, "answer": "one"}}\n' for i in range(count))
    (folder / f"said-{count}.jsonl").write_text(answers)
    return f"eval.tasks=[{{name: asked, path: ask-{count}.jsonl}}]"


def evaluated(folder: Path, name: str, systems: str, count: int, *more: str) -> tuple[float, float, Path]:
    """An evaluation that makes all of its answers: processor seconds, seconds and the run."""
    (folder / "runs" / "answers.db").unlink(missing_ok=True)
    task, words = write_task(folder, count), (f"rollout.max_new_tokens={TOKENS}", "reward=sentiment", *more)
    took = ran(folder, "stage=eval", f"stage.systems={{{systems}}}", task, f"run.name={name}", *words)
    return *took, folder / "runs" / "eval" / name


def adapters(folder: Path, rounds: int) -> dict[str, Any]:
    for seed in range(EIGHT):
        ran(folder, "stage=sft", "stage.max_steps=1", "stage.eval_size=4", f"seed={seed}", f"run.name=s{seed}")
    eight = ", ".join(f"s{seed}: sft:s{seed}" for seed in range(EIGHT))
    cases = {"one": ("s0: sft:s0, file: {{file: said-{}.jsonl}}", EIGHT), "eight": (eight, 1)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    memory = dict[str, float]()
    for number in range(rounds):
        for name in sorted(cases, reverse=bool(number % 2)):
            systems, times = cases[name]
            took = []
            for count in (FEW * times, PROMPTS * times):
                label = f"{name}-{number}-{count}"
                spent, _, run = evaluated(folder, label, systems.format(count), count, "rollout=bank")
                took.append(spent)
                memory[name] = max(memory.get(name, 0.0), read_manifest(run).metrics["peak_rss_mb"])
            seconds[name].append((took[1] - took[0]) / (EIGHT * (PROMPTS - FEW)))
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    weights = sum(
        path.stat().st_size for path in (folder / "runs" / "sft" / "s0" / "artifact").glob("*.safetensors")
    ) / 2**20  # fmt: skip
    return {
        "processor_s_a_row": middle, "ratio": middle["eight"] / middle["one"], "peak_rss_mb": memory,
        "adapter_mb": weights, "rows": EIGHT * PROMPTS, "tokens": TOKENS, "rounds": seconds,
    }  # fmt: skip


def smollm2(folder: Path) -> dict[str, Any]:
    """The whole command, its imports and the load of the model among it."""
    systems = "base: base, file: {file: said-200.jsonl}"
    _, took, run = evaluated(folder, "smollm2", systems, 200, "model=smollm2", "method=lora", "rollout=bank")
    return {"seconds": took, "answers": read_manifest(run).metrics["answers_made"], "tokens": TOKENS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("adapters", "smollm2"))
    parser.add_argument("--save", type=Path, help="where to write the figures")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": {"processor": platform.processor(), "cpus": len(os.sched_getaffinity(0))}}
    with tempfile.TemporaryDirectory(prefix="align-systems-") as scratch:
        if given.only != "smollm2":
            found["adapters"] = adapters(Path(scratch), given.rounds)
            print(json.dumps(found["adapters"]), flush=True)
        if given.only != "adapters":
            found["smollm2"] = smollm2(Path(scratch))
            print(json.dumps(found["smollm2"]), flush=True)
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")
