"""Compare the verdicts of `align.reward.checkers` on answers to IFEval with those of lm-eval's code.

Usage: python benchmarks/evals/ifeval_verdicts.py IFEVAL_FILE ANSWERS SYSTEM [--save FILE]

IFEVAL_FILE has google/IFEval's rows as JSON Lines. ANSWERS is the `answers.jsonl` of an evaluation, such as that of
`recipes/instructions/evaluate.sh`, and SYSTEM one of its systems. It needs `pip install "lm-eval[ifeval]"`, which
downloads NLTK's data when it is imported. langdetect draws at random; here its seed is 0.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from langdetect import DetectorFactory
from lm_eval.tasks.ifeval.utils import process_results

from align.reward.checkers import build_checkers, get_check_spec

READINGS = ("strict", "loose")


class Verdict(NamedTuple):
    """Whether an answer follows an instruction by align's and by lm-eval's code, strictly and loosely."""

    prompt: int
    instruction: str
    align: tuple[bool, bool]
    lm_eval: tuple[bool, bool]


def compare_answer(row: Mapping[str, Any], answer: str) -> list[Verdict]:
    """Return the verdicts on an answer, one for each instruction of the prompt."""
    (checker,) = build_checkers(get_check_spec(row, "row"), 1, "row")
    assert checker is not None
    result = checker(answer)
    if result.error:
        raise ValueError(f"prompt {row['key']} cannot be checked: {result.error}")
    published = process_results(row, [answer])
    both = zip(published["inst_level_strict_acc"], published["inst_level_loose_acc"], strict=True)
    return [
        Verdict(row["key"], instruction, (part.held, part.loosely), (strict, loose))
        for instruction, part, (strict, loose) in zip(row["instruction_id_list"], result.parts, both, strict=True)
    ]


def compute_accuracies(verdicts: Iterable[Verdict], code: str) -> dict[str, float]:
    """Return the four accuracies of IFEval by the verdicts of `align` or `lm_eval`."""
    by_prompt: dict[int, list[tuple[bool, bool]]] = {}
    for verdict in verdicts:
        by_prompt.setdefault(verdict.prompt, []).append(getattr(verdict, code))
    accuracies = {}
    for reading, name in enumerate(READINGS):
        prompts = [all(part[reading] for part in parts) for parts in by_prompt.values()]
        instructions = [part[reading] for parts in by_prompt.values() for part in parts]
        accuracies[f"prompt_{name}"] = sum(prompts) / len(prompts)
        accuracies[f"instruction_{name}"] = sum(instructions) / len(instructions)
    return accuracies


def compare_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return the accuracies by both codes, and for each instruction with a different verdict how many differ."""
    counts = Counter(verdict.instruction for verdict in verdicts)
    different = [verdict for verdict in verdicts if verdict.align != verdict.lm_eval]
    return {
        "prompts": len({verdict.prompt for verdict in verdicts}),
        "verdicts": len(verdicts),
        "equal": len(verdicts) - len(different),
        "accuracies": {code: compute_accuracies(verdicts, code) for code in ("align", "lm_eval")},
        "different": {
            instruction: {
                "of": counts[instruction],
                "prompts": [v.prompt for v in different if v.instruction == instruction],
            }
            for instruction in sorted({verdict.instruction for verdict in different})
        },
    }


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """Return Markdown tables of the accuracies and of the instructions whose verdicts differ."""
    accuracies = comparison["accuracies"]
    names = list(accuracies["align"])
    lines = [f"| verdicts of | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    lines += [f"| {code} | {' | '.join(f'{row[name]:.4f}' for name in names)} |" for code, row in accuracies.items()]
    lines += ["", f"{comparison['equal']} of {comparison['verdicts']} verdicts are equal, strict and loose."]
    for instruction, row in comparison["different"].items():
        prompts = ", ".join(map(str, row["prompts"]))
        lines.append(f"- {instruction}: {len(row['prompts'])} of {row['of']} differ, on prompts {prompts}")
    return "\n".join(lines)


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
    print(format_comparison(comparison))
    if options.save:
        options.save.write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
