"""Measure by simulation how often an evaluation's intervals cover the truth, its gates err, and differences of the
stated detectable size are detected.

    python benchmarks/evals/coverage.py [--draws 2000] [--save benchmarks/evals/coverage.json]

Computes every figure of `align.evals.stats` on samples with known true values (`simulation.py`), at correlations of 0,
0.3 and 0.8 between the four answers to a prompt, and compares it with its bar; then the usual alternatives, which miss
the bars. Bars hold plus or minus three standard errors of the simulation; those of paired differences of shares hold as
they are, over 20,000 draws. It takes about ten minutes of one core.
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
from length_measures import compute_measure_biases
from simulation import (
    HIGHEST_COVERAGE,
    HIGHEST_PAIRED_COVERAGE,
    ICCS,
    JUDGES,
    LOOK_LEVELS,
    LOWEST_COVERAGE,
    LOWEST_PAIRED_COVERAGE,
    MAX_FALSE_PASSES,
    MAX_FAMILY_PASSES,
    MAX_PASSES_OVER_LOOKS,
    MIN_POWER,
    build_interval_cases,
    build_margin_figures,
    build_null_figures,
    build_paired_cases,
    build_scenarios,
    build_skewed_cases,
    build_wrong_cases,
    compute_paired_difference,
    compute_unpaired_difference,
    is_within_bar,
    measure_coverage,
    measure_false_passes,
    measure_family_passes,
    measure_length_control,
    measure_passes_over_looks,
    measure_power,
    measure_power_at_detectable,
    measure_sign_flip_rejections,
)

from align.evals.stats.decisions import DecisionRule

Row = dict[str, Any]
PAIRED_DRAWS = 20_000
"""Samples for each case of a paired difference of shares."""
MAX_RELATIVE_WIDTH = 1.05
LENGTH_SAMPLES = 200
"""Samples for each length-biased judge."""


def compute_tolerance(share: float, draws: int) -> float:
    """Return three standard errors of a share."""
    return 3 * math.sqrt(share * (1 - share) / draws)


def iter_coverage_rows(draws: int) -> Iterator[Row]:
    for prompts in (32, 64, 256):
        for case in build_interval_cases(prompts):
            figures = measure_coverage(case, draws)
            yield {"name": case.name, **figures, "holds": is_within_bar(figures["coverage"], draws)}


def iter_paired_rows() -> Iterator[Row]:
    """Yield the coverage and width of paired differences. `holds` is about the coverage; `is_narrow` tells whether the
    width meets its bar."""
    for prompts in (64, 256):
        for case in build_paired_cases(prompts):
            figures = measure_coverage(case, PAIRED_DRAWS)
            holds = LOWEST_PAIRED_COVERAGE <= figures["coverage"] <= HIGHEST_PAIRED_COVERAGE
            is_narrow = figures["relative_width"] <= MAX_RELATIVE_WIDTH
            yield {"name": case.name, **figures, "is_narrow": is_narrow, "holds": holds}


def iter_skewed_rows(draws: int) -> Iterator[Row]:
    """Yield the coverage of means of skewed observations. Below 32 observations there is no bar."""
    for observations in (8, 32, 128):
        for case in build_skewed_cases(observations):
            figures = measure_coverage(case, draws)
            holds = observations < 32 or is_within_bar(figures["coverage"], draws)
            yield {"name": case.name, **figures, "holds": holds}


def iter_superior_rows(draws: int) -> Iterator[Row]:
    for prompts in (64, 256):
        for name, figure in build_null_figures(prompts).items():
            yield build_false_pass_row(name, measure_false_passes(figure, draws, DecisionRule("superior")), draws)


def iter_not_worse_rows(draws: int) -> Iterator[Row]:
    for prompts in (32, 64, 256):
        for name, (margin, figure) in build_margin_figures(prompts).items():
            yield build_false_pass_row(
                name, measure_false_passes(figure, draws, DecisionRule("not_worse", margin)), draws
            )


def build_false_pass_row(name: str, passed: float, draws: int) -> Row:
    holds = passed <= MAX_FALSE_PASSES + compute_tolerance(passed, draws)
    return {"name": name, "passed": passed, "holds": holds}


def iter_power_rows(draws: int) -> Iterator[Row]:
    for prompts in (64, 256):
        for scenario in build_scenarios():
            power = measure_power_at_detectable(scenario, prompts, draws)
            holds = power >= MIN_POWER - compute_tolerance(power, draws)
            yield {"name": f"{scenario.name}, {prompts} prompts", "found": power, "holds": holds}


def iter_repeated_rows() -> Iterator[Row]:
    """Yield the error of ten gates if one passed gate is enough, and of eight looks at growing data."""
    share = measure_family_passes(10, PAIRED_DRAWS)
    yield {"name": "ten gates, one is enough", "passed": share, "holds": share <= MAX_FAMILY_PASSES}
    for name, compute_level in LOOK_LEVELS.items():
        share = measure_passes_over_looks(compute_level, PAIRED_DRAWS)
        yield {"name": f"eight looks, {name}", "passed": share, "holds": share <= MAX_PASSES_OVER_LOOKS}


def iter_length_control_rows() -> Iterator[Row]:
    for judge in JUDGES:
        figures = measure_length_control(judge, LENGTH_SAMPLES)
        is_unbiased = abs(figures["controlled"] - 0.5) <= 0.01
        holds = is_unbiased and LOWEST_COVERAGE <= figures["coverage"] <= HIGHEST_COVERAGE
        yield {"name": judge, **figures, "holds": holds}


def iter_sign_flip_rows(draws: int) -> Iterator[Row]:
    for icc in ICCS:
        for prompts in (16, 64):
            share = measure_sign_flip_rejections(prompts, icc, draws)
            yield {
                "name": f"sign flips, ICC {icc}, {prompts} × 4",
                "rejected": share,
                "holds": share <= 0.05 + compute_tolerance(share, draws),
            }


def iter_alternative_rows(draws: int) -> Iterator[Row]:
    """Yield rows of wrong methods: they have to miss the bars, so `holds` should be false."""
    for name, case in build_wrong_cases().items():
        figures = measure_coverage(case, draws)
        yield {"name": f"{name}: {case.name}", **figures, "holds": is_within_bar(figures["coverage"], draws)}
    yield {"name": "ten gates at their own level", "passed": measure_family_passes(10, draws, is_adjusted=False)}
    yield {"name": "eight looks at 95 %", "passed": measure_passes_over_looks(lambda counts: 0.95, draws)}
    for name, compute_difference in (
        ("paired", compute_paired_difference),
        ("unpaired z", compute_unpaired_difference),
    ):
        power = measure_power(compute_difference, 400, draws)
        yield {"name": f"{name}: five points on 400 prompts", "found": power}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--save", type=Path, help="where to write the figures")
    options = parser.parse_args()
    started = time.process_time()
    report = {}
    sections = {
        "coverage": iter_coverage_rows(options.draws),
        "paired differences": iter_paired_rows(),
        "means of skewed observations": iter_skewed_rows(PAIRED_DRAWS),
        "superior on equal systems": iter_superior_rows(options.draws),
        "not_worse at the bound": iter_not_worse_rows(options.draws),
        "several gates and several looks": iter_repeated_rows(),
        "detectable differences": iter_power_rows(options.draws),
        "length-loving judge": iter_length_control_rows(),
        "measures of length": compute_measure_biases(),
        "tests": iter_sign_flip_rows(options.draws // 4),
        "alternatives": iter_alternative_rows(options.draws),
    }
    for section, rows in sections.items():
        print(f"\n{section}")
        report[section] = []
        for row in rows:
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            report[section].append(rounded)
            print("  ", *(f"{key} {value}" for key, value in rounded.items()), flush=True)
    missed = [
        row["name"] for section in sections if section != "alternatives" for row in report[section] if not row["holds"]
    ]
    wide = [row["name"] for row in report["paired differences"] if not row["is_narrow"]]
    print(f"\n{time.process_time() - started:.0f} CPU seconds; bars missed: {', '.join(missed) or 'none'}")
    print(f"wider than {MAX_RELATIVE_WIDTH}: {', '.join(wide) or 'none'}")
    if options.save:
        header = {
            "machine": {
                "processor": platform.machine(),
                "cpus": len(os.sched_getaffinity(0)),
                "numpy": np.__version__,
            },
            "cpu_s": round(time.process_time() - started),
            "draws": options.draws,
            "missed": missed,
        }
        options.save.write_text(json.dumps(header | report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
