"""The figures of this recipe: IFEval before, after imitation and after practice, and what the training forgot.

Usage: python recipes/instructions/figures.py RUN_ROOT IFEVAL_FILE SEED… [--save FILE] [--pairs N]

The seeds are those of one call of `evaluate.sh`. The table has them and the seeds that are in FILE already. Differences
are clustered by prompt: the answers of all seeds to one prompt are one observation. So their intervals are about other
prompts, and not about other seeds.
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

from align.ops.intervals import mean_interval
from align.report import format_interval
from align.reward.checkers import CheckResult, build_checkers, compute_accuracy, get_check_spec
from align.run import read_manifest
from align.run.environment import describe_processor

SYSTEMS = ("base", "imitated", "practised")
TRAINED = frozenset(
    [
        "number_words",
        "number_sentences",
        "number_bullet_lists",
        "multiple_sections",
        "json_format",
        "title",
        "postscript",
        "end_checker",
        "quotation",
        "english_lowercase",
        "english_capital",
        "existence",
        "forbidden_words",
        "no_comma",
        "number_highlighted_sections",
        "number_placeholders",
    ]
)
"""IFEval's names of the instructions that `prompts.py` asks for."""
COLUMNS = (
    "seed",
    "system",
    "prompts, strict",
    "loose",
    "instructions, strict",
    "loose",
    "trained kinds",
    "other kinds",
    "chats, −bits a byte",
    "sums",
    "refusals",
)
ACCURACIES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")


def read_rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def name_run(probe: str, seeds: Sequence[int]) -> str:
    """Return the name of the evaluation of some seeds on `ifeval`, `ifbench` or `forgetting`."""
    return "-".join([probe, *map(str, seeds)])


def name_system(name: str, seed: int) -> str:
    return name if name == "base" else f"{name}-{seed}"


def read_answers(root: Path, probe: str, seeds: Sequence[int]) -> dict[str, dict[str, str]]:
    """Return each system's answers to the prompts of `ifeval` or `ifbench` by the id of the prompt."""
    rows = read_rows(root / "eval" / name_run(probe, seeds) / "artifact" / "answers.jsonl")
    return {system: {row["id"]: row["answers"][system]["text"] for row in rows} for system in rows[0]["answers"]}


def read_forgetting(root: Path, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return each system's scores on the probes of forgetting by the probe's name."""
    file = root / "eval" / name_run("forgetting", seeds) / "artifact" / "results.json"
    tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    systems = {system for task in tasks.values() for system in task["systems"]}
    return {system: {name: task["systems"][system]["score"] for name, task in tasks.items()} for system in systems}


def check_answers(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> list[CheckResult]:
    """Return the results of IFEval's checks, one for each row."""
    results = []
    for row in rows:
        id = str(row["key"])
        (checker,) = build_checkers(get_check_spec(row, id), 1, id)
        assert checker is not None
        results.append(checker(answers[id]))
    return results


def measure_kinds(rows: Sequence[Mapping[str, Any]], results: Sequence[CheckResult]) -> dict[str, float]:
    """Return the shares of instructions that answers follow, of the kinds that were trained and of the others."""
    verdicts: dict[str, list[bool]] = {"trained": [], "other": []}
    for row, result in zip(rows, results, strict=True):
        for id, part in zip(row["instruction_id_list"], result.parts, strict=True):
            verdicts["trained" if id.partition(":")[2] in TRAINED else "other"].append(part.held)
    return {name: sum(values) / len(values) for name, values in verdicts.items()}


def count_training_minutes(root: Path, seed: int) -> float:
    """Return the minutes from the beginning of the sampling of examples to the end of the practice."""
    started = read_manifest(root / "sample" / f"best-{seed}").times["started"]
    finished = read_manifest(root / "ppo" / f"practised-{seed}").times["finished"]
    return (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds() / 60


def measure_system(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str]) -> dict[str, Any]:
    """Return IFEval's accuracies, the shares by kind, and for each prompt whether its answer follows it."""
    results = check_answers(rows, answers)
    accuracy = compute_accuracy(results)._asdict()
    return {
        **{name: accuracy[name] for name in ACCURACIES},
        "kinds": measure_kinds(rows, results),
        "follows": [int(all(part.held for part in result.parts)) for result in results],
    }


def read_seeds(root: Path, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Mapping[str, Any]]:
    """Return the figures of each seed: the minutes of training, and of each system the figures of `measure_system` and
    the scores on the probes of forgetting."""
    hardware = read_manifest(root / "eval" / name_run("ifeval", seeds)).hardware
    forgetting = read_forgetting(root, seeds)
    systems = {
        system: measure_system(rows, answers) | {"forgetting": forgetting[system]}
        for system, answers in read_answers(root, "ifeval", seeds).items()
    }
    return [
        {
            "seed": seed,
            "processor": describe_processor(hardware),
            "minutes": count_training_minutes(root, seed),
            "systems": {name: systems[name_system(name, seed)] for name in SYSTEMS},
        }
        for seed in seeds
    ]


def compare_with_base(seeds: Sequence[Mapping[str, Any]], system: str) -> dict[str, Any]:
    """Return the mean change of the share of prompts whose instructions are all followed, over prompts and seeds."""
    after = np.array([seed["systems"][system]["follows"] for seed in seeds])
    before = np.array([seed["systems"]["base"]["follows"] for seed in seeds])
    return mean_interval((after - before).mean(axis=0)).as_dict()


def format_table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each seed and system, and the mean changes of all seeds."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    for seed in seeds:
        for name in SYSTEMS:
            system = seed["systems"][name]
            shares = [*(system[accuracy] for accuracy in ACCURACIES), *system["kinds"].values()]
            forgetting = system["forgetting"]
            cells = [*(f"{share:.3f}" for share in shares), f"{forgetting['texts']['value']:.3f}"]
            cells += [f"{forgetting[probe]['value']:.2f}" for probe in ("sums", "refusals")]
            lines.append(f"| {seed['seed']} | {name} | {' | '.join(cells)} |")
    lines.append("")
    for name in SYSTEMS[1:]:
        change = format_interval(compare_with_base(seeds, name), "+.3f")
        lines.append(f"- {name} minus base, prompts that are followed strictly, mean of the seeds: {change}")
    return "\n".join(lines) + "\n"


def format_pairs(
    rows: Sequence[Mapping[str, Any]], before: Mapping[str, str], after: Mapping[str, str], count: int
) -> str:
    """Return random prompts with the answers before and after training."""
    sample = random.Random(0).sample(rows, count)
    return "\n".join(
        f"### {row['prompt']}\n\nbefore: {before[str(row['key'])]}\n\nafter: {after[str(row['key'])]}\n"
        for row in sample
    )


def add_saved_seeds(seeds: Sequence[Mapping[str, Any]], file: Path) -> list[Mapping[str, Any]]:
    """Return the seeds with those of a saved file that are not among them, sorted."""
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    by_seed = {row["seed"]: row for row in [*saved, *seeds]}
    return [by_seed[seed] for seed in sorted(by_seed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("ifeval", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--save", type=Path, help="add the figures to this JSON file")
    parser.add_argument("--pairs", type=int, default=0, help="print as many random prompts with both answers")
    options = parser.parse_args()
    rows = read_rows(options.ifeval)
    seeds = read_seeds(options.root, rows, options.seeds)
    if options.pairs:
        answers = read_answers(options.root, "ifeval", options.seeds)
        before, after = answers["base"], answers[name_system("practised", options.seeds[0])]
        print(format_pairs(rows, before, after, options.pairs))
    if options.save:
        seeds = add_saved_seeds(seeds, options.save)
    print(format_table(seeds), end="")
    if options.save:
        options.save.write_text(json.dumps(seeds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
