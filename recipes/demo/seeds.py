"""Compare the seeds of the demo with its goals and bars, or set the bars from the tuning seeds.

A bar of `bars.json` is the mean of the tuning seeds, less three standard deviations if more is better, else plus three.
It holds for each seed. The topic is judged over all seeds: its change is averaged by question first.

Usage: python recipes/demo/seeds.py measured|tuning FOLDER [--save FILE] [--set-bars]   (FOLDER as seeds.sh makes it)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from align.evals.collapse import VARIED
from align.ops.intervals import mean_interval
from align.report import format_interval

SEEDS = {"measured": (0, 1, 2), "tuning": (11, 12, 13, 14, 15)}
"""File of questions → the seeds that are run on it."""
BARS = Path(__file__).with_name("bars.json")
BARRED_FIGURES = {"rubric_change": ">=", "over_cut": ">=", "kl": "<="}
"""Figures that get a bar from the tuning seeds → the comparison with the bar that a seed must meet."""
FIGURE_NAMES = {"rubric_change": "change of the rubric", "over_cut": "over the null policy `cut`", "kl": "KL"}
MIN_MEAN_CHANGE = 0.2
MIN_CHANGE_LOW = 0.1
MIN_TOPIC_LOW = -0.05

Row = dict[str, Any]
"""The figures of one seed."""
Bars = Mapping[str, tuple[str, float]]
"""Figure → the comparison and the number."""


class Verdict(NamedTuple):
    """A figure in words, its bar in words, and whether it reaches the bar."""

    text: str
    bar: str
    is_met: bool


def read_rows_of_seeds(questions: str, folder: Path) -> list[Row]:
    """Read the figures of all seeds of a file of questions. Exits if a seed is missing or was measured on other
    questions."""
    rows = []
    for seed in SEEDS[questions]:
        path = folder / str(seed) / "figures.json"
        if not path.is_file():
            sys.exit(f"{path} is missing: run recipes/demo/seeds.sh {questions} {folder}")
        figures = json.loads(path.read_text(encoding="utf-8"))
        if (figures["seed"], figures["questions_file"]) != (seed, questions):
            sys.exit(f"{path} holds seed {figures['seed']} on the {figures['questions_file']} questions")
        rows.append(build_row(figures))
    return rows


def build_row(figures: Mapping[str, Any]) -> Row:
    """Build the row of one seed from the figures that guards.py saved."""
    topic = figures["topic"]
    return {
        "seed": figures["seed"],
        "processor": figures["processor"],
        "questions": figures["questions"],
        "rubric_before": figures["rubric"]["before"],
        "rubric_after": figures["rubric"]["after"],
        "rubric_change": figures["rubric_change"],
        "over_cut": figures["over_cut"],
        "kl": figures["kl"],
        "guards": {guard["name"]: [guard["before"], guard["after"], guard["is_met"]] for guard in figures["guards"]},
        "collapse": figures["collapse"],
        "topic": {side: fmean(row[side] for row in topic) for side in ("before", "after")},
        "changed_topic": {
            row["question"]: row["after"] - row["before"] for row in topic if row["after"] != row["before"]
        },
    }


def get_value(row: Row, name: str) -> float:
    return row[name]["value"] if isinstance(row[name], Mapping) else row[name]


def get_low_end(interval: Mapping[str, Any]) -> float:
    """Return the low end of an interval, or its value if all observations are equal, which gives no interval."""
    return interval["value"] if interval["low"] is None else interval["low"]


def compute_bars(rows: Sequence[Row]) -> Bars:
    bars = {}
    for name, sign in BARRED_FIGURES.items():
        values = [get_value(row, name) for row in rows]
        margin = 3 * stdev(values) * (1 if sign == "<=" else -1)
        bars[name] = (sign, round(fmean(values) + margin, 4))
    return bars


def pool_topic(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Return the change of the topic's share over all seeds, with an interval over the questions."""
    changes = np.zeros(rows[0]["questions"])
    sums = Counter[str]()
    for row in rows:
        sums.update(row["changed_topic"])
    changes[: len(sums)] = [*sums.values()]
    return mean_interval(changes / len(rows)).as_dict()


def list_verdicts(rows: Sequence[Row], bars: Bars) -> list[Verdict]:
    """Compare the seeds with the goals, the guards and the bars."""
    mean_change = fmean(row["rubric_change"]["value"] for row in rows)
    least_change = min(get_low_end(row["rubric_change"]) for row in rows)
    least_over_cut = min(get_low_end(row["over_cut"]) for row in rows)
    topic = pool_topic(rows)
    verdicts = [
        Verdict(
            f"change of the rubric, mean over the seeds {mean_change:+.3f}",
            f">= {MIN_MEAN_CHANGE}",
            mean_change >= MIN_MEAN_CHANGE,
        ),
        Verdict(
            f"change of the rubric, lowest low end {least_change:+.3f}",
            f"> {MIN_CHANGE_LOW}",
            least_change > MIN_CHANGE_LOW,
        ),
        Verdict(f"over the null policy `cut`, lowest low end {least_over_cut:+.3f}", "> 0", least_over_cut > 0),
        Verdict(
            f"topic, change as a mean of the seeds, interval over questions {format_interval(topic, '+.3f')}",
            f"low end > {MIN_TOPIC_LOW}",
            get_low_end(topic) > MIN_TOPIC_LOW,
        ),
    ]
    for row in rows:
        missed = [name for name, (_, _, is_met) in row["guards"].items() if not is_met]
        if row["collapse"] != VARIED:
            missed.append(f"greedy answers: {row['collapse']}")
        verdicts.append(Verdict(f"seed {row['seed']}, guards: {', '.join(missed) or 'all met'}", "all", not missed))
        for name, (sign, bar) in bars.items():
            value = get_value(row, name)
            is_met = value >= bar if sign == ">=" else value <= bar
            verdicts.append(Verdict(f"seed {row['seed']}, {FIGURE_NAMES[name]} {value:.3f}", f"{sign} {bar:g}", is_met))
    return verdicts


def format_table(rows: Sequence[Row]) -> str:
    """Return the figures as a Markdown table, one column a seed."""
    lines = [
        ["", *(f"seed {row['seed']}" for row in rows)],
        ["---"] * (len(rows) + 1),
        ["rubric, before → after", *(f"{row['rubric_before']:.3f} → {row['rubric_after']:.3f}" for row in rows)],
        ["change of the rubric", *(format_interval(row["rubric_change"], "+.3f") for row in rows)],
        [
            "null policy `cut`",
            *(f"{row['rubric_after'] - row['over_cut']['value']:.3f}" for row in rows),
        ],
        ["over the null policy `cut`", *(format_interval(row["over_cut"], "+.3f") for row in rows)],
    ]
    for name in rows[0]["guards"]:
        cells = [row["guards"][name] for row in rows]
        lines.append(
            [name, *(f"{before:.3f} → {after:.3f}{'' if met else ' (missed)'}" for before, after, met in cells)]
        )
    topics = [f"{row['topic']['before']:.3f} → {row['topic']['after']:.3f}" for row in rows]
    lines.append(["likelier after its own question", *topics])
    lines.append(["greedy answers", *(row["collapse"] for row in rows)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", choices=SEEDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--save", type=Path, help="file for the figures of these seeds, as JSON")
    parser.add_argument("--set-bars", action="store_true", help="write bars.json, from the tuning seeds alone")
    arguments = parser.parse_args()
    rows = read_rows_of_seeds(arguments.questions, arguments.folder)
    if arguments.set_bars:
        if arguments.questions != "tuning":
            parser.error("--set-bars takes the tuning seeds")
        BARS.write_text(json.dumps(compute_bars(rows), indent=2) + "\n", encoding="utf-8")
    if arguments.save:
        arguments.save.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not BARS.is_file():
        sys.exit(f"{BARS} is missing: make it from the tuning seeds by --set-bars")
    print(format_table(rows))
    for name in ("rubric_change", "over_cut"):
        interval = mean_interval([get_value(row, name) for row in rows]).as_dict()
        figure = f"{FIGURE_NAMES[name]}, mean of {len(rows)} seeds with an interval over seeds"
        print(f"{figure}: {format_interval(interval, '+.3f')}")
    verdicts = list_verdicts(rows, json.loads(BARS.read_text(encoding="utf-8")))
    for verdict in verdicts:
        print(f"{verdict.text}  (bar: {verdict.bar}){'' if verdict.is_met else '  MISSED'}")
    return int(not all(verdict.is_met for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
