"""Score null policies by the rubric, before anything is trained.

The first three do not answer the question. If one of them scores as well as the untouched model, the rubric is wrong:

    constant    the untouched model's answer that scores best as the answer to every question
    echo        the question, and a stock question
    other       the untouched model's answer to another question
    cut         the untouched model's answer cut to two sentences, and a stock question

Usage: python recipes/demo/null_policies.py RUN_ROOT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from rubric import score_answer, split_sentences

from align.run import resolve
from align.track import read_rows

STOCK_QUESTION = "Would you like to know more about it?"
TRIED_CONSTANTS = 64
"""Number of answers that are tried as a constant answer: those that score best to their own questions."""
MUST_LOSE = ("constant", "echo", "other")
"""Null policies that must score below the untouched model."""


class Answer(NamedTuple):
    """An answer, its question, and whether it ended by itself and was not cut."""

    question: str
    text: str
    is_finished: bool = True


def score_answers(answers: Sequence[Answer]) -> list[float]:
    """Return the rubric's scores. A cut answer meets no item, even if it ends as a sentence does."""
    return [score_answer(answer.question, answer.text) if answer.is_finished else 0.0 for answer in answers]


def keep_first_sentences(text: str, sentences: int = 2) -> str:
    return " ".join(split_sentences(text)[:sentences])


def find_best_constant(answers: Sequence[Answer]) -> str:
    """Return the text that has the highest mean score as the answer to every question."""
    questions = [answer.question for answer in answers]
    scores = score_answers(answers)
    best_first = sorted(range(len(answers)), key=lambda i: -scores[i])
    candidates = [answers[i].text for i in best_first[:TRIED_CONSTANTS]]
    return max(candidates, key=lambda text: fmean(score_answer(question, text) for question in questions))


def build_null_answers(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Return the answers of each null policy to the questions of the untouched model's answers, in their order."""
    constant = find_best_constant(answers)
    shifted = [*answers[len(answers) // 2 :], *answers[: len(answers) // 2]]
    return {
        "constant": [Answer(answer.question, constant) for answer in answers],
        "echo": [Answer(answer.question, f"{answer.question} {STOCK_QUESTION}") for answer in answers],
        "other": [
            Answer(answer.question, unrelated.text, unrelated.is_finished)
            for answer, unrelated in zip(answers, shifted, strict=True)
        ],
        "cut": [Answer(answer.question, f"{keep_first_sentences(answer.text)} {STOCK_QUESTION}") for answer in answers],
        "cut, no question": [Answer(answer.question, keep_first_sentences(answer.text)) for answer in answers],
    }


def read_sampled_answers(root: Path) -> list[Answer]:
    """Read the answers of the untouched model that went to the annotators: the first one to each question."""
    answers: dict[str, Answer] = {}
    for row in read_rows(resolve("sample:latest", root).path.parent / "samples.jsonl"):
        question = row["prompt"][-1]["content"]
        answers.setdefault(question, Answer(question, row["answer"], row["ended"]))
    return [*answers.values()]


def main(root: Path) -> int:
    answers = read_sampled_answers(root)
    policies = {"untouched": answers, **build_null_answers(answers)}
    scores = {name: fmean(score_answers(policy)) for name, policy in policies.items()}
    print(f"rubric, {len(answers)} questions")
    for name, score in scores.items():
        print(f"  {name:<18}{score:.3f}")
    winners = [name for name in MUST_LOSE if scores[name] >= scores["untouched"]]
    for name in winners:
        print(f"{name} scores as well as the untouched model: the rubric is wrong")
    return int(bool(winners))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
