"""Compare QLoRA, LoRA and full fine-tuning of the built-in model on the same tokens: a table of docs/choosing.md.

    python benchmarks/methods.py [--root runs/methods] [--save benchmarks/methods.json] [--dtype bfloat16]

Each method's learning rate is the best of its list on the tuning seed. With it three other seeds are trained, with all
methods of a seed before the next seed. Other settings are those of the quickstart's SFT. Each run is a process of its
own, so that its peak memory is measured. Finished runs are not made again. About half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from align.run import read_manifest

LEARNING_RATES = {"qlora": (3e-4, 1e-3, 3e-3), "lora": (3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4, 1e-3)}
TUNING_SEED = 9
SEEDS = (0, 1, 2)
SETTINGS = ("data.max_length=256", "stage.max_steps=80")
FIGURES = ("loss_after", "peak_rss_mb", "seconds")


def run_training(method: str, learning_rate: float, seed: int, root: Path, dtype: str) -> dict[str, float]:
    """Train once and return the held-out loss in nats a token, the peak memory in MB, and the seconds from the run's
    start to its end."""
    stage = "full" if method == "full" else "sft"
    name = f"{method}-{learning_rate:g}-seed{seed}"
    command = [
        *(sys.executable, "-m", "align", f"stage={stage}", f"method={method}", f"stage.lr={learning_rate}"),
        *(f"seed={seed}", f"dtype={dtype}", *SETTINGS, f"run.root={root}", f"run.name={name}"),
    ]
    subprocess.run(command, check=True)
    manifest = read_manifest(root / stage / name)
    started = datetime.fromisoformat(manifest.times["started"])
    finished = datetime.fromisoformat(manifest.times["finished"])
    figures = dict(manifest.metrics) | {"seconds": (finished - started).total_seconds()}
    return {key: round(figures[key], 4) for key in FIGURES}


def compare_methods(root: Path, dtype: str) -> dict[str, Any]:
    """Return method → its learning rate, the losses that chose it, and each figure for each seed."""
    tuning_losses = {
        method: {rate: run_training(method, rate, TUNING_SEED, root, dtype)["loss_after"] for rate in rates}
        for method, rates in LEARNING_RATES.items()
    }
    best_rates = {method: min(losses, key=losses.__getitem__) for method, losses in tuning_losses.items()}
    figures_by_seed = [
        {method: run_training(method, rate, seed, root, dtype) for method, rate in best_rates.items()} for seed in SEEDS
    ]
    return {
        method: {
            "lr": best_rate,
            "tuned": {f"{rate:g}": loss for rate, loss in tuning_losses[method].items()},
            **{key: [figures[method][key] for figures in figures_by_seed] for key in FIGURES},
        }
        for method, best_rate in best_rates.items()
    }


def format_table(report: dict[str, Any]) -> str:
    """Return the table of docs/choosing.md: means over the seeds, and the standard deviation of the loss."""
    lines = [
        "| method | learning rate (held-out loss at each that was tried) | held-out loss | peak memory, MB | seconds |",
        "|---|---|---|---|---|",
    ]
    for method, row in report.items():
        loss, memory, seconds = (row[key] for key in FIGURES)
        tuning_losses = ", ".join(f"{rate}: {value:.3f}" for rate, value in row["tuned"].items())
        figures = f"{mean(loss):.3f} ± {stdev(loss):.3f} | {mean(memory):.0f} | {mean(seconds):.0f}"
        lines.append(f"| {method} | {row['lr']:g} ({tuning_losses}) | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/methods"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine multiplies it by itself")
    options = parser.parse_args()
    report = compare_methods(options.root, options.dtype)
    print("\n" + format_table(report))
    if options.save:
        options.save.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
