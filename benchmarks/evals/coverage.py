"""How often the intervals of an evaluation cover, its gates err and its stated differences are found, by simulation.

    python benchmarks/evals/coverage.py [--draws 2000] [--save benchmarks/evals/coverage.json]

Every figure of `align.evals.stats` on worlds whose truth is known (`simulated.py`), at correlations of 0, 0.3 and 0.8
between the four answers to a prompt, beside its bar; then the usual alternatives, which miss it. Bars hold give or take
three standard errors of the simulation. It takes about three minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from length_measures import measures
from simulated import (
    FOUND,
    HIGHEST,
    ICCS,
    JUDGES,
    LOWEST,
    WRONGLY,
    at_the_bound,
    cases,
    covered,
    equals,
    found_at_detectable,
    length_control,
    null_p,
    paired,
    passed_wrongly,
    power_of,
    unpaired,
    within_bar,
    worlds,
    wrong_cases,
)

from align.evals.stats import Rule

Row = dict[str, Any]
SETS = 200
"""Of the length-loving judge."""


def error(share: float, draws: int) -> float:
    """Three standard errors of a share."""
    return 3 * math.sqrt(share * (1 - share) / draws)


def coverages(draws: int) -> Iterator[Row]:
    for n in (32, 64, 256):
        for case in cases(n):
            found = covered(case, draws)
            yield {"name": case.name, **found, "holds": within_bar(found["coverage"], draws)}


def gates(draws: int) -> Iterator[Row]:
    for n in (64, 256):
        for name, figure in equals(n).items():
            passed = passed_wrongly(figure, draws, Rule("superior"))
            yield {"name": name, "passed": passed, "holds": passed <= WRONGLY + error(passed, draws)}


def bounds(draws: int) -> Iterator[Row]:
    for n in (32, 64, 256):
        for name, (margin, figure) in at_the_bound(n).items():
            passed = passed_wrongly(figure, draws, Rule("not_worse", margin))
            yield {"name": name, "passed": passed, "holds": passed <= WRONGLY + error(passed, draws)}


def powers(draws: int) -> Iterator[Row]:
    for n in (64, 256):
        for world in worlds():
            found = found_at_detectable(world, n, draws)
            yield {"name": f"{world.name}, {n} prompts", "found": found, "holds": found >= FOUND - error(found, draws)}


def length_controls() -> Iterator[Row]:
    for judge in JUDGES:
        found = length_control(judge, SETS)
        holds = abs(found["controlled"] - 0.5) <= 0.01 and LOWEST <= found["coverage"] <= HIGHEST
        yield {"name": judge, **found, "holds": holds}


def tests(draws: int) -> Iterator[Row]:
    for icc in ICCS:
        for n in (16, 64):
            share = null_p(n, icc, draws)
            yield {
                "name": f"sign flips, ICC {icc}, {n} × 4",
                "rejected": share,
                "holds": share <= 0.05 + error(share, draws),
            }


def alternatives(draws: int) -> Iterator[Row]:
    """What the bars are to refuse: here `holds` is false."""
    for name, case in wrong_cases().items():
        found = covered(case, draws)
        yield {"name": f"{name}: {case.name}", **found, "holds": within_bar(found["coverage"], draws)}
    for name, difference in (("paired", paired), ("unpaired z", unpaired)):
        yield {"name": f"{name}: five points on 400 prompts", "found": power_of(difference, 400, draws)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--save", type=Path, help="where to write the figures")
    given = parser.parse_args()
    began, found = time.process_time(), {}
    parts = {
        "coverage": coverages(given.draws), "superior on equal systems": gates(given.draws),
        "not_worse at the bound": bounds(given.draws),
        "detectable differences": powers(given.draws), "length-loving judge": length_controls(),
        "measures of length": measures(), "tests": tests(given.draws // 4), "alternatives": alternatives(given.draws),
    }  # fmt: skip
    for part, rows in parts.items():
        print(f"\n{part}")
        found[part] = []
        for row in rows:
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            found[part].append(rounded)
            print("  ", *(f"{key} {value}" for key, value in rounded.items()), flush=True)
    missed = [row["name"] for part in parts if part != "alternatives" for row in found[part] if not row["holds"]]
    print(f"\n{time.process_time() - began:.0f} CPU seconds; bars missed: {', '.join(missed) or 'none'}")
    if given.save:
        machine = {"processor": platform.machine(), "cpus": len(os.sched_getaffinity(0)), "numpy": np.__version__}
        head = {"machine": machine, "cpu_s": round(time.process_time() - began), "draws": given.draws, "missed": missed}
        given.save.write_text(json.dumps(head | found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
