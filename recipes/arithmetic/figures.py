"""The figures of finished runs of this recipe, and the table of them that docs/recipes.md shows.

Usage: python recipes/arithmetic/figures.py RUN_ROOT… [--save FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from align.report import format_interval
from align.run import Manifest, read_manifest
from align.run.environment import describe_processor

STAGES = ("full", "ppo", "eval")


def find_newest_runs(root: Path) -> dict[str, tuple[Path, Manifest]]:
    """Return the folder and the manifest of each stage's newest finished run."""
    newest: dict[str, tuple[Path, Manifest]] = {}
    for stage in STAGES:
        folders = [path.parent for path in root.glob(f"{stage}/*/manifest.json")]
        runs = [(folder, manifest) for folder in folders if (manifest := read_manifest(folder)).status == "done"]
        newest[stage] = max(runs, key=lambda run: run[1].publication)
    return newest


def measure_recipe(root: Path) -> dict[str, Any]:
    """Return the accuracies of one seed on held-out sums, with intervals, and what the run cost."""
    runs = find_newest_runs(root)
    task = json.loads((runs["eval"][0] / "artifact" / "results.json").read_text(encoding="utf-8"))["tasks"]["sums"]
    ppo = runs["ppo"][1].metrics
    keys = ("value", "low", "high")
    return {
        "seed": runs["ppo"][1].seed,
        "processor": describe_processor(runs["ppo"][1].hardware),
        "sums": task["items"],
        "taught": {key: task["systems"]["taught"]["score"][key] for key in keys},
        "practised": {key: task["systems"]["practised"]["score"][key] for key in keys},
        "difference": {key: task["against"]["taught"]["difference"][key] for key in keys},
        "reward": ppo["last_score"],
        "kl": ppo["last_kl"],
        "minutes": {stage: run_seconds(run) / 60 for stage, (_, run) in runs.items()},
        "peak_rss_mb": max(run.metrics["peak_rss_mb"] for stage, (_, run) in runs.items() if stage != "eval"),
    }


def run_seconds(run: Manifest) -> float:
    started, finished = (datetime.fromisoformat(run.times[key]) for key in ("started", "finished"))
    return (finished - started).total_seconds()


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with one row a seed and processor."""
    lines = [
        "| processor | seed | sums | taught by examples | after GRPO | difference | KL, nats an answer | minutes |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        cells = (
            row["processor"],
            row["seed"],
            row["sums"],
            *(format_interval(row[name], ".2f") for name in ("taught", "practised", "difference")),
        )
        lines.append(f"| {' | '.join(map(str, cells))} | {row['kl']:.2f} | {sum(row['minutes'].values()):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs="+")
    parser.add_argument("--save", type=Path, help="put the figures into the list in this JSON file")
    options = parser.parse_args()
    rows = sorted(map(measure_recipe, options.roots), key=lambda row: (row["processor"], row["seed"]))
    print(format_table(rows), end="")
    if options.save:
        measured = {(row["processor"], row["seed"]) for row in rows}
        saved = json.loads(options.save.read_text(encoding="utf-8")) if options.save.is_file() else []
        rows += [row for row in saved if (row["processor"], row["seed"]) not in measured]
        rows.sort(key=lambda row: (row["processor"], row["seed"]))
        options.save.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
