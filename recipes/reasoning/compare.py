"""Compare align with TRL over the seeds of this recipe, and print the table of docs/recipes.md.

Usage: python recipes/reasoning/compare.py RUN_ROOT… [--save FILE]

The exit status is 3 if a bar is missed. The intervals of differences are over seeds, so that one seed decides nothing:
see `align.ops.intervals.mean_interval`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from align.core.errors import NOT_PASSED
from align.ops.intervals import mean_interval
from align.report import format_interval
from align.run import Manifest, read_manifest
from align.run.environment import describe_processor

START = (0.05, 0.5)
"""Lowest and highest share of right answers that GRPO may start from."""
MAX_COMMONEST = 0.1
"""Largest share of questions that may have the same right answer."""
MARGIN = 0.05
"""How far align may lie below TRL after equal numbers of answers."""
DIFFERENCES = {"align": "equal minutes", "as-many": "equal answers"}
"""Systems that are compared with TRL's, and what is the same on both sides."""

COLUMNS = (
    "seed",
    "start",
    "align",
    "TRL",
    "align after as many answers as TRL",
    "updates, align / TRL",
    "minutes, align / TRL",
)
RUNS = (("ppo", "timed"), ("ppo", "as-many"), ("eval", "compared"))
"""Stage and name of each run that is read."""


def read_seed(root: Path) -> dict[str, Any]:
    """Return the shares of right answers of one seed, and what both sides spent."""
    runs = {name: read_manifest(root / stage / name) for stage, name in RUNS}
    results = json.loads((root / "eval" / "compared" / "artifact" / "results.json").read_text(encoding="utf-8"))
    trl = json.loads((root / "trl" / "training.json").read_text(encoding="utf-8"))
    facts = results["tasks"]["facts"]
    timed = runs["timed"]
    if "first_started" in timed.times:
        raise SystemExit(f"{root}: align's run was interrupted, so its time is not known. Run this seed in a new root.")
    return {
        "seed": runs["compared"].seed,
        "processor": describe_processor(runs["compared"].hardware),
        "questions": facts["items"],
        "commonest": measure_commonest_answer(root / "trl" / "questions.jsonl"),
        "right": {name: system["score"] for name, system in facts["systems"].items()},
        "minutes": {"align": count_minutes(timed), "trl": trl["minutes"]},
        "updates": {"align": timed.metrics["updates"], "trl": trl["updates"]},
    }


def count_minutes(run: Manifest) -> float:
    started, finished = (datetime.fromisoformat(run.times[key]) for key in ("started", "finished"))
    return (finished - started).total_seconds() / 60


def measure_commonest_answer(path: Path) -> float:
    """Return the share of the questions of a file that have the commonest right answer."""
    checks = [json.loads(line)["check"] for line in path.read_text(encoding="utf-8").splitlines()]
    return max(Counter(check["answer"].lower() for check in checks).values()) / len(checks)


def pool_differences(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return for each comparison with TRL the mean of the seeds' differences with its interval. One seed has none."""
    return {
        name: mean_interval([row["right"][name]["value"] - row["right"]["trl"]["value"] for row in rows]).as_dict()
        for name in DIFFERENCES
    }


def list_missed_bars(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each bar that the seeds miss. One seed has no interval, so no bar on differences."""
    missed = []
    for row in rows:
        start = row["right"]["start"]["value"]
        if not START[0] <= start <= START[1]:
            missed.append(f"seed {row['seed']} starts at {start:.2f}, outside of {START[0]} to {START[1]}")
        if row["commonest"] > MAX_COMMONEST:
            missed.append(f"with seed {row['seed']} one answer is right to {row['commonest']:.0%} of the questions")
        if row["minutes"]["align"] > row["minutes"]["trl"]:
            missed.append(f"with seed {row['seed']} align trained longer than TRL: lower UPDATES, in a new root")
    if len(rows) == 1:
        return missed
    pooled = pool_differences(rows)
    for name, bar in (("align", 0.0), ("as-many", -MARGIN)):
        low = pooled[name]["value"] if pooled[name]["low"] is None else pooled[name]["low"]
        if low <= bar:
            difference = format_interval(pooled[name], "+.3f")
            missed.append(f"{DIFFERENCES[name]}: the low end of the difference, {difference}, is not above {bar:+.2f}")
    return missed


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each seed, and the mean differences over them."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in rows:
        shares = " | ".join(format_interval(row["right"][name], ".2f") for name in ("start", "align", "trl", "as-many"))
        updates = row["updates"]
        minutes = row["minutes"]
        lines.append(
            f"| {row['seed']} | {shares} | {updates['align']} / {updates['trl']} "
            f"| {minutes['align']:.1f} / {minutes['trl']:.1f} |"
        )
    lines.append("")
    for name, difference in pool_differences(rows).items():
        lines.append(
            f"- align minus TRL at {DIFFERENCES[name]}, mean of the seeds: {format_interval(difference, '+.3f')}"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", type=Path, nargs="+")
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    rows = sorted(map(read_seed, options.roots), key=lambda row: row["seed"])
    if len({row["seed"] for row in rows}) < len(rows):
        raise SystemExit("two of the roots hold the same seed")
    print(format_table(rows), end="")
    if options.save:
        options.save.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    missed = list_missed_bars(rows)
    for sentence in missed:
        print(f"missed: {sentence}")
    return NOT_PASSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
