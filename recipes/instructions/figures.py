"""The figures of this recipe: IFEval before, after imitation and after practice, and what the training forgot.

Usage: python recipes/instructions/figures.py RUN_ROOT IFEVAL_FILE SEED… [--save FILE] [--pairs N]

The seeds are those of one call of `evaluate.sh`. The table has them and the seeds that are in FILE already.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from instruction_prompts import KINDS

from align.ops.intervals import mean_interval
from align.report import format_interval
from align.reward.checkers import CheckResult, build_checker, compute_accuracy, get_check_spec
from align.run import read_manifest
from align.run.environment import describe_processor

SYSTEMS = ("base", "imitated", "practised")
COMPARISONS = (("imitated", "base"), ("practised", "base"), ("practised", "imitated"))
READINGS = ("strict", "loose")
TRAINING = (("sample", "answers"), ("sft", "imitated"), ("ppo", "practised"))
"""The stages and the names of the runs that train a seed."""
SHARES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose", "trained_kinds", "other_kinds")
COLUMNS = (
    "seed",
    "system",
    "prompts, strict",
    "prompts, loose",
    "instructions, strict",
    "instructions, loose",
    "of the 16 trained kinds, strict",
    "of the 9 others, strict",
    "bits a byte of chats (lower is better)",
    "right sums",
    "refusals of harmful requests",
    "minutes of training",
)

Figures = Mapping[str, Any]
"""The figures of one seed: `seed`, `minutes`, and `systems`, by name, with the verdicts on each prompt."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def name_evaluation(name: str, seeds: Sequence[int]) -> str:
    """Return the name of the run that evaluates seeds on `ifeval`, `ifbench` or `forgetting`."""
    return "-".join([name, *map(str, seeds)])


def name_system(name: str, seed: int) -> str:
    return name if name == "base" else f"{name}-{seed}"


def read_answers(root: Path, evaluation: str, seeds: Sequence[int]) -> dict[str, dict[str, str]]:
    """Return each system's answers to the prompts of `ifeval` or `ifbench` by the prompt's id."""
    rows = read_rows(root / "eval" / name_evaluation(evaluation, seeds) / "artifact" / "answers.jsonl")
    return {system: {row["id"]: row["answers"][system]["text"] for row in rows} for system in rows[0]["answers"]}


def read_forgetting(root: Path, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return each system's scores, with intervals, on the probes of forgetting by the probe's name."""
    file = root / "eval" / name_evaluation("forgetting", seeds) / "artifact" / "results.json"
    tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    systems = {system for task in tasks.values() for system in task["systems"]}
    return {system: {name: task["systems"][system]["score"] for name, task in tasks.items()} for system in systems}


def check_answer(row: Mapping[str, Any], answer: str) -> CheckResult:
    """Return the result of IFEval's checks of an answer.

    Raises:
        ValueError: the answer cannot be checked.
    """
    spec = get_check_spec(row, str(row["key"]))
    result = build_checker(spec, str(row["key"]))(answer)
    if result.error:
        raise ValueError(f"the answer to prompt {row['key']} cannot be checked: {result.error}")
    return result


def measure_kinds(rows: Sequence[Mapping[str, Any]], results: Sequence[CheckResult]) -> dict[str, float]:
    """Return the shares of instructions that are followed strictly, of the trained kinds and of the others."""
    verdicts: dict[str, list[bool]] = {"trained_kinds": [], "other_kinds": []}
    for row, result in zip(rows, results, strict=True):
        for id, part in zip(row["instruction_id_list"], result.parts, strict=True):
            verdicts["trained_kinds" if id.partition(":")[2] in KINDS else "other_kinds"].append(part.held)
    return {name: sum(values) / len(values) for name, values in verdicts.items()}


def measure_system(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> dict[str, Any]:
    """Return IFEval's accuracies, the shares by kind, and for each prompt whether all its instructions are followed,
    strictly and loosely."""
    results = {str(row["key"]): check_answer(row, answers[str(row["key"])]) for row in rows}
    accuracy = compute_accuracy([*results.values()])._asdict()
    return {
        **{name: accuracy[name] for name in SHARES if name in accuracy},
        **measure_kinds(rows, [*results.values()]),
        "strict": {key: int(all(part.held for part in result.parts)) for key, result in results.items()},
        "loose": {key: int(all(part.loosely for part in result.parts)) for key, result in results.items()},
    }


def count_training_minutes(root: Path, seed: int) -> float | None:
    """Return the minutes that the three runs of a seed took, or None if one of them was interrupted."""
    minutes = 0.0
    for stage, name in TRAINING:
        times = read_manifest(root / stage / f"{name}-{seed}").times
        if "first_started" in times:
            return None
        started, finished = (datetime.fromisoformat(times[moment]) for moment in ("started", "finished"))
        minutes += (finished - started).total_seconds() / 60
    return minutes


def read_seeds(root: Path, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Figures]:
    forgetting = read_forgetting(root, seeds)
    systems = {
        system: measure_system(rows, answers) | {"forgetting": forgetting[system]}
        for system, answers in read_answers(root, "ifeval", seeds).items()
    }
    return [
        {
            "seed": seed,
            "processor": describe_processor(read_manifest(root / "ppo" / f"practised-{seed}").hardware),
            "minutes": count_training_minutes(root, seed),
            "systems": {name: systems[name_system(name, seed)] for name in SYSTEMS},
        }
        for seed in seeds
    ]


def add_to_file(figures: Sequence[Figures], file: Path) -> list[Figures]:
    """Add the figures to a file, which may have those of other seeds, and return what it has then, sorted by seed.

    Raises:
        ValueError: they are of other prompts.
    """
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    by_seed = {row["seed"]: row for row in [*saved, *figures]}
    merged = [by_seed[seed] for seed in sorted(by_seed)]
    if len({tuple(row["systems"]["base"]["strict"]) for row in merged}) > 1:
        raise ValueError(f"{file}: its seeds were asked other prompts. Name another file")
    file.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    return merged


def compare_systems(figures: Sequence[Figures], after: str, before: str, reading: str) -> dict[str, Any]:
    """Return the mean difference of the shares of prompts that two systems follow, with an interval over prompts.

    The answers of all seeds to one prompt are one observation. So the interval is about other prompts, and not about
    other seeds.
    """
    differences = [
        [
            row["systems"][after][reading][key] - row["systems"][before][reading][key]
            for key in row["systems"][after][reading]
        ]
        for row in figures
    ]
    return mean_interval(np.mean(differences, axis=0)).as_dict()


def format_comparisons(figures: Sequence[Figures], reading: str) -> list[str]:
    """Return a line for each comparison of two systems."""
    return [
        f"- {after} minus {before}, prompts, {reading}, mean of {len(figures)} seeds and 95 % interval over prompts: "
        + format_interval(compare_systems(figures, after, before, reading), "+.3f")
        for after, before in COMPARISONS
    ]


def format_row(seed: str, name: str, system: Mapping[str, Any], minutes: float | None) -> str:
    scores = system["forgetting"]
    cells = [*(f"{system[share]:.3f}" for share in SHARES), f"{-scores['texts']['value']:.3f}"]
    cells += [format_interval(scores[probe], ".2f") for probe in ("sums", "refusals")]
    return f"| {seed} | {name} | {' | '.join(cells)} | {'' if minutes is None else f'{minutes:.0f}'} |"


def format_table(figures: Sequence[Figures]) -> str:
    """Return a Markdown table with the untouched model and each seed's systems, and the comparisons over all seeds."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines.append(format_row("", "base", figures[0]["systems"]["base"], None))
    for row in figures:
        lines.append(format_row(row["seed"], "imitated", row["systems"]["imitated"], None))
        lines.append(format_row(row["seed"], "practised", row["systems"]["practised"], row["minutes"]))
    return "\n".join([*lines, "", *format_comparisons(figures, "strict")]) + "\n"


def format_pairs(
    rows: Sequence[Mapping[str, Any]], before: Mapping[str, str], after: Mapping[str, str], count: int
) -> str:
    """Return random prompts with the answers before and after training."""
    sample = random.Random(0).sample(rows, count)
    return "\n".join(
        f"### {row['prompt']}\n\nbefore: {before[str(row['key'])]}\n\nafter: {after[str(row['key'])]}\n"
        for row in sample
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("ifeval", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--save", type=Path, help="add the figures to this JSON file")
    parser.add_argument("--pairs", type=int, default=0, help="print as many random prompts with both answers")
    options = parser.parse_args()
    rows = read_rows(options.ifeval)
    if options.pairs:
        answers = read_answers(options.root, "ifeval", options.seeds)
        after = answers[name_system("practised", options.seeds[0])]
        print(format_pairs(rows, answers["base"], after, options.pairs))
    figures = read_seeds(options.root, rows, options.seeds)
    if options.save:
        figures = add_to_file(figures, options.save)
    print(format_table(figures), end="")


if __name__ == "__main__":
    main()
