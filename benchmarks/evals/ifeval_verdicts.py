"""Compare the verdicts of `align.reward.checkers` on answers to IFEval with those of lm-eval's code.

Usage: python benchmarks/evals/ifeval_verdicts.py IFEVAL_FILE ANSWERS SYSTEM [--save FILE]

IFEVAL_FILE has google/IFEval's rows as JSON Lines. ANSWERS is the `answers.jsonl` of an evaluation, such as that of
`recipes/instructions/evaluate.sh`, and SYSTEM one of its systems, such as `base`.

It needs `pip install "lm-eval[ifeval]"`, which downloads NLTK's data when it is imported. Two of lm-eval's checks draw
at random: langdetect, and the letter of prompts 1122 and 1129. Their seed is 0 here, for each answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from langdetect import DetectorFactory
from lm_eval.tasks.ifeval.utils import process_results

from align.reward.checkers import build_checker, get_check_spec

READINGS = ("strict", "loose")


class Verdict(NamedTuple):
    """The verdicts of align's and of lm-eval's code on an instruction of an answer: followed strictly, and loosely."""

    prompt: int
    instruction: str
    align: tuple[bool, bool]
    lm_eval: tuple[bool, bool]


def compare_answer(row: Mapping[str, Any], answer: str) -> list[Verdict]:
    """Return the verdicts on an answer, one for each instruction of the prompt.

    Raises:
        ValueError: align's checks cannot decide about the answer.
    """
    result = build_checker(get_check_spec(row, "row"), "row")(answer)
    if result.error:
        raise ValueError(f"prompt {row['key']} cannot be checked: {result.error}")
    random.seed(0)
    published = process_results(row, [answer])
    both = zip(published["inst_level_strict_acc"], published["inst_level_loose_acc"], strict=True)
    return [
        Verdict(row["key"], instruction, (part.held, part.loosely), (strict, loose))
        for instruction, part, (strict, loose) in zip(row["instruction_id_list"], result.parts, both, strict=True)
    ]


def compute_accuracies(verdicts: Iterable[Verdict], implementation: str) -> dict[str, float]:
    """Return the four accuracies of IFEval by the verdicts of `align` or `lm_eval`."""
    by_prompt: dict[int, list[tuple[bool, bool]]] = {}
    for verdict in verdicts:
        by_prompt.setdefault(verdict.prompt, []).append(getattr(verdict, implementation))
    accuracies = {}
    for index, reading in enumerate(READINGS):
        prompts = [all(part[index] for part in parts) for parts in by_prompt.values()]
        instructions = [part[index] for parts in by_prompt.values() for part in parts]
        accuracies[f"prompt_{reading}"] = sum(prompts) / len(prompts)
        accuracies[f"instruction_{reading}"] = sum(instructions) / len(instructions)
    return accuracies


def list_differences(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """Return each difference between the two implementations, with the one by which the instruction is followed."""
    return [
        {
            "prompt": verdict.prompt,
            "instruction": verdict.instruction,
            "reading": reading,
            "followed_by": "align" if verdict.align[index] else "lm_eval",
        }
        for verdict in verdicts
        for index, reading in enumerate(READINGS)
        if verdict.align[index] != verdict.lm_eval[index]
    ]


def compare_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the accuracies by both implementations, and the instructions on which they differ."""
    return {
        "prompts": len({verdict.prompt for verdict in verdicts}),
        "instructions": len(verdicts),
        "accuracies": {name: compute_accuracies(verdicts, name) for name in ("align", "lm_eval")},
        "differences": list_differences(verdicts),
    }


def format_table(comparison: Mapping[str, Any]) -> str:
    """Return Markdown tables of the accuracies and of the instructions on which the implementations differ."""
    accuracies = comparison["accuracies"]
    names = list(accuracies["align"])
    lines = [
        f"| verdicts by | {' | '.join(name.replace('_', ', ') for name in names)} |",
        "|" + "---|" * (len(names) + 1),
    ]
    for implementation, row in accuracies.items():
        lines.append(f"| {implementation.replace('_', '-')} | {' | '.join(f'{row[name]:.4f}' for name in names)} |")
    lines += ["", "| prompt | instruction | reading | followed by the checks of |", "|---|---|---|---|"]
    for row in comparison["differences"]:
        cells = (row["prompt"], row["instruction"], row["reading"], row["followed_by"].replace("_", "-"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def read_rows(file: Path) -> list[Any]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ifeval", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("system")
    parser.add_argument("--save", type=Path, help="write the comparison to this JSON file")
    options = parser.parse_args()
    DetectorFactory.seed = 0
    answers = {row["id"]: row["answers"][options.system]["text"] for row in read_rows(options.answers)}
    rows = read_rows(options.ifeval)
    verdicts = [verdict for row in rows for verdict in compare_answer(row, answers[str(row["key"])])]
    comparison = compare_verdicts(verdicts)
    print(format_table(comparison), end="")
    if options.save:
        options.save.write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
