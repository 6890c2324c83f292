"""Measure the cost of many systems in an evaluation: eight adapters compared with as many rows of one adapter, and
SmolLM2 on 200 prompts.

    python benchmarks/evals/systems.py [--rounds 3] [--save systems.json] [--only adapters|smollm2]

`adapters`: answers of eight adapters of the built-in model to N prompts each, and of one adapter to 8·N, by
`rollout=bank`. Reported are the processor seconds of a large run less those of a small one, which leaves out imports
and loading, and the peak memory. `smollm2`: 200 prompts of 64 tokens, seconds of the whole command. On a CPU, two
threads.
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

ADAPTERS = 8
PROMPTS = 40
WARM_UP_PROMPTS = 4
"""Prompts of the small run, whose processor time is subtracted."""
MAX_NEW_TOKENS = 64
CHECK = {"kind": "regex", "pattern": "e"}


def run_align(folder: Path, *overrides: str) -> tuple[float, float]:
    """Run a command of align in a folder. Returns processor seconds and wall-clock seconds.

    Raises:
        SystemExit: the command failed. The message has its output.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    usage_before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    command = [sys.executable, "-m", "align", *overrides]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(overrides)}\n{process.stdout}{process.stderr}")
    return usage.ru_utime + usage.ru_stime - usage_before.ru_utime - usage_before.ru_stime, seconds


def write_task(folder: Path, count: int) -> str:
    """Write a task of so many prompts, and a file of answers to them, `said-COUNT.jsonl`, as a second system. Returns
    the override that selects the task."""
    rows = [{"id": i, "prompt": f"Tell me something about the number {i}.", "check": CHECK} for i in range(count)]
    (folder / f"ask-{count}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    answers = "".join(f'{{"id": {i}, "answer": "one"}}\n' for i in range(count))
    (folder / f"said-{count}.jsonl").write_text(answers)
    return f"eval.tasks=[{{name: asked, path: ask-{count}.jsonl}}]"


def evaluate(folder: Path, name: str, systems: str, count: int, *overrides: str) -> tuple[float, float, Path]:
    """Evaluate systems without cached answers. Returns processor seconds, wall-clock seconds and the run's folder."""
    (folder / "runs" / "answers.db").unlink(missing_ok=True)
    processor_seconds, seconds = run_align(
        folder,
        "stage=eval",
        f"stage.systems={{{systems}}}",
        write_task(folder, count),
        f"run.name={name}",
        f"rollout.max_new_tokens={MAX_NEW_TOKENS}",
        "reward=sentiment",
        *overrides,
    )
    return processor_seconds, seconds, folder / "runs" / "eval" / name


def measure_adapters(folder: Path, rounds: int) -> dict[str, Any]:
    """Compare the processor time a row of eight adapters with that of one adapter on eight times the prompts."""
    for seed in range(ADAPTERS):
        run_align(folder, "stage=sft", "stage.max_steps=1", "stage.eval_size=4", f"seed={seed}", f"run.name=s{seed}")
    eight_systems = ", ".join(f"s{seed}: sft:s{seed}" for seed in range(ADAPTERS))
    # name → systems, and by how much the number of prompts is multiplied
    cases = {"one": ("s0: sft:s0, file: {{file: said-{}.jsonl}}", ADAPTERS), "eight": (eight_systems, 1)}
    seconds_a_row: dict[str, list[float]] = {name: [] for name in cases}
    peak_rss_mb = dict[str, float]()
    for number in range(rounds):
        for name in sorted(cases, reverse=bool(number % 2)):
            systems, factor = cases[name]
            run_seconds = []
            for count in (WARM_UP_PROMPTS * factor, PROMPTS * factor):
                run_name = f"{name}-{number}-{count}"
                processor_seconds, _, run = evaluate(folder, run_name, systems.format(count), count, "rollout=bank")
                run_seconds.append(processor_seconds)
                peak_rss_mb[name] = max(peak_rss_mb.get(name, 0.0), read_manifest(run).metrics["peak_rss_mb"])
            small_seconds, large_seconds = run_seconds
            seconds_a_row[name].append((large_seconds - small_seconds) / (ADAPTERS * (PROMPTS - WARM_UP_PROMPTS)))
    medians = {name: statistics.median(values) for name, values in seconds_a_row.items()}
    weight_files = (folder / "runs" / "sft" / "s0" / "artifact").glob("*.safetensors")
    return {
        "processor_s_a_row": medians,
        "ratio": medians["eight"] / medians["one"],
        "peak_rss_mb": peak_rss_mb,
        "adapter_mb": sum(path.stat().st_size for path in weight_files) / 2**20,
        "rows": ADAPTERS * PROMPTS,
        "tokens": MAX_NEW_TOKENS,
        "rounds": seconds_a_row,
    }


def measure_smollm2(folder: Path) -> dict[str, Any]:
    """Measure a whole command with SmolLM2, including imports and loading the model."""
    systems = "base: base, file: {file: said-200.jsonl}"
    _, seconds, run = evaluate(folder, "smollm2", systems, 200, "model=smollm2", "method=lora", "rollout=bank")
    return {"seconds": seconds, "answers": read_manifest(run).metrics["answers_made"], "tokens": MAX_NEW_TOKENS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("adapters", "smollm2"))
    parser.add_argument("--save", type=Path, help="where to write the figures")
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": {"processor": platform.processor(), "cpus": len(os.sched_getaffinity(0))}}
    with tempfile.TemporaryDirectory(prefix="align-systems-") as folder:
        if options.only != "smollm2":
            report["adapters"] = measure_adapters(Path(folder), options.rounds)
            print(json.dumps(report["adapters"]), flush=True)
        if options.only != "adapters":
            report["smollm2"] = measure_smollm2(Path(folder))
            print(json.dumps(report["smollm2"]), flush=True)
    if options.save:
        options.save.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
