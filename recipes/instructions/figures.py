"""The figures of this recipe: IFEval before, after imitation and after practice, and what the training forgot.

Usage: python recipes/instructions/figures.py RUN_ROOT IFEVAL_FILE SEED… [--save FILE] [--pairs N]

Differences are clustered by prompt: the answers of all seeds to one prompt are one observation. So their intervals are
about other prompts, and not about other seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
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


def read_answers(root: Path, seed: int, name: str) -> dict[str, dict[str, str]]:
    """Return each system's answers by the id of the prompt."""
    lines = (root / "eval" / f"{name}-{seed}" / "artifact" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {system: {row["id"]: row["answers"][system]["text"] for row in rows} for system in SYSTEMS}


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


def read_seed(root: Path, rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return the figures of one seed: for each system IFEval's accuracies, the shares by kind, the verdict on each
    prompt, and the scores of the probes of forgetting."""
    manifest = read_manifest(root / "eval" / f"ifeval-{seed}")
    results_file = root / "eval" / f"forgetting-{seed}" / "artifact" / "results.json"
    probes = json.loads(results_file.read_text(encoding="utf-8"))["tasks"]
    figures: dict[str, Any] = {"seed": seed, "processor": describe_processor(manifest.hardware), "systems": {}}
    for system, answers in read_answers(root, seed, "ifeval").items():
        results = check_answers(rows, answers)
        accuracy = compute_accuracy(results)._asdict()
        figures["systems"][system] = {
            **{name: accuracy[name] for name in ACCURACIES},
            "kinds": measure_kinds(rows, results),
            "follows": [int(all(part.held for part in result.parts)) for result in results],
            "forgetting": {name: task["systems"][system]["score"] for name, task in probes.items()},
        }
    return figures


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


def format_pairs(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Mapping[str, str]], count: int) -> str:
    """Return random prompts with the answers before and after training."""
    sample = random.Random(0).sample(rows, count)
    return "\n".join(
        f"### {row['prompt']}\n\nbefore: {answers['base'][str(row['key'])]}\n\n"
        f"after: {answers['practised'][str(row['key'])]}\n"
        for row in sample
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("ifeval", type=Path)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--save", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--pairs", type=int, default=0, help="print as many random prompts with both answers")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.ifeval.read_text(encoding="utf-8").splitlines()]
    seeds = [read_seed(options.root, rows, seed) for seed in options.seeds]
    if options.pairs:
        print(format_pairs(rows, read_answers(options.root, options.seeds[0], "ifeval"), options.pairs))
    print(format_table(seeds), end="")
    if options.save:
        options.save.write_text(json.dumps(seeds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
