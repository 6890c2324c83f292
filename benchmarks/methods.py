"""QLoRA, LoRA and full fine-tuning of the built-in model on the same tokens: a table of docs/choosing.md.

    python benchmarks/methods.py [--root runs/methods] [--save benchmarks/methods.json] [--dtype bfloat16]

Each method's learning rate is the best of its list on a seed of its own; then three other seeds are trained with it,
the methods by turns. Other settings are those of the quickstart's SFT. A run is a process of its own, for its peak
memory; finished ones are not made again. About half an hour on two CPU cores.
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

RATES = {"qlora": (3e-4, 1e-3, 3e-3), "lora": (3e-4, 1e-3, 3e-3), "full": (3e-5, 1e-4, 3e-4, 1e-3)}
TUNING_SEED, SEEDS = 9, (0, 1, 2)
SETTINGS = ("data.max_length=256", "stage.max_steps=80")
FIGURES = ("loss_after", "peak_rss_mb", "seconds")


def trained(method: str, rate: float, seed: int, root: Path, dtype: str) -> dict[str, float]:
    """One run: held-out loss in nats a token, peak memory in MB, and seconds from the run's start to its end."""
    stage, name = "full" if method == "full" else "sft", f"{method}-{rate:g}-seed{seed}"
    words = [f"stage={stage}", f"method={method}", f"stage.lr={rate}", f"seed={seed}", f"dtype={dtype}", *SETTINGS]
    run = [sys.executable, "-m", "align", *words, f"run.root={root}", f"run.name={name}"]
    subprocess.run(run, check=True)
    manifest = read_manifest(root / stage / name)
    ended, started = (datetime.fromisoformat(manifest.times[key]) for key in ("finished", "started"))
    found = dict(manifest.metrics) | {"seconds": (ended - started).total_seconds()}
    return {key: round(found[key], 4) for key in FIGURES}


def compare(root: Path, dtype: str) -> dict[str, Any]:
    """By method: the rate, the losses that chose it, and each figure a seed."""
    tuned = {
        method: {rate: trained(method, rate, TUNING_SEED, root, dtype)["loss_after"] for rate in rates}
        for method, rates in RATES.items()
    }
    best = {method: min(losses, key=losses.__getitem__) for method, losses in tuned.items()}
    rows = [{method: trained(method, rate, seed, root, dtype) for method, rate in best.items()} for seed in SEEDS]
    return {
        method: {"lr": rate, "tuned": {f"{tried:g}": loss for tried, loss in tuned[method].items()}}
        | {key: [row[method][key] for row in rows] for key in FIGURES}
        for method, rate in best.items()
    }


def format_table(found: dict[str, Any]) -> str:
    """The table: means over the seeds, and the standard deviation of the loss."""
    lines = [
        "| method | learning rate (held-out loss at each that was tried) | held-out loss | peak memory, MB | seconds |",
        "|---|---|---|---|---|",
    ]
    for method, row in found.items():
        loss, memory, seconds = (row[key] for key in FIGURES)
        tried = ", ".join(f"{rate}: {value:.3f}" for rate, value in row["tuned"].items())
        figures = f"{mean(loss):.3f} ± {stdev(loss):.3f} | {mean(memory):.0f} | {mean(seconds):.0f}"
        lines.append(f"| {method} | {row['lr']:g} ({tried}) | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/methods"))
    parser.add_argument("--save", type=Path)
    parser.add_argument("--dtype", default="auto", help="bfloat16 where the machine multiplies it by itself")
    given = parser.parse_args()
    found = compare(given.root, given.dtype)
    print("\n" + format_table(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
