"""Verdicts of all kinds of judges, on pairs of answers and on single answers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from align.core.types import Conversation
from align.evals.stats.verdicts import compute_wins, merge_swapped_verdicts

FIRST = "first"
"""Value of `JudgeVerdict.order`: the answer of the first evaluated model is shown first."""
SECOND = "second"
"""Value of `JudgeVerdict.order`: the answer of the first evaluated model is shown second."""


class AnswerPair(NamedTuple):
    """The answers of two evaluated models to one prompt.

    Attributes:
        id: of the item, unique in its task.
        first, second: the answers of the first system and of the other one, without hidden reasoning.
    """

    id: str
    prompt: Conversation
    first: str
    second: str


class JudgeVerdict(NamedTuple):
    """A judge's verdict on a pair of answers shown in one order, or on a single answer.

    Attributes:
        prompt: the id of the pair or of the answer.
        order: `first` if the first system's answer was shown first, `second` if the other one was. Empty for judges
            without an order, such as scorers.
        verdict: on a pair, 1 if the first system's answer is better, 0 if the other one is, ½ for a tie; on an answer,
            1 for yes, 0 for no.
        p: the judge's probability of a verdict of 1. None if it gives none.
        by: the name of the person. Empty for other judges.
        error: why there is no verdict, which counts as ½. Empty if there is one.
    """

    prompt: str
    order: str
    verdict: float
    p: float | None = None
    by: str = ""
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as the JSON object of a line in `verdicts.jsonl`. Empty strings are left out, except for
        `order`."""
        return {key: value for key, value in self._asdict().items() if value != "" or key == "order"}


def judge_by_scores(ids: Sequence[str], first: Sequence[float], second: Sequence[float]) -> list[JudgeVerdict]:
    """Return one verdict for each prompt from the scores of its two answers: the higher score wins, equal scores tie.
    Raises ValueError if a score is NaN."""
    return [JudgeVerdict(id, "", win) for id, win in zip(ids, compute_wins(first, second).tolist(), strict=True)]


def merge_verdicts(verdicts: Iterable[JudgeVerdict]) -> dict[str, float]:
    """Average the verdicts on each prompt, and return prompt id → mean in [0, 1]. A judge's verdicts in both orders
    count as a tie if they differ, and as one verdict if they agree."""
    by_judge: dict[tuple[str, str], dict[str, list[float]]] = {}
    for verdict in verdicts:
        orders = by_judge.setdefault((verdict.prompt, verdict.by), {})
        orders.setdefault(verdict.order, []).append(verdict.verdict)
    by_prompt: dict[str, list[float]] = {}
    for (prompt, _), orders in by_judge.items():
        means = [sum(values) / len(values) for values in orders.values()]
        has_both = FIRST in orders and SECOND in orders
        merged = merge_swapped_verdicts(means[:1], means[1:]).item() if has_both else sum(means) / len(means)
        by_prompt.setdefault(prompt, []).append(merged)
    return {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()}


def collect_both_orders(verdicts: Iterable[JudgeVerdict]) -> Mapping[str, tuple[float, float]]:
    """Return prompt id → (verdict with the first model's answer shown first, verdict with it shown second). Prompts
    without a valid verdict in each order are left out."""
    by_prompt: dict[str, dict[str, float]] = {}
    for verdict in verdicts:
        if not verdict.error:
            by_prompt.setdefault(verdict.prompt, {})[verdict.order] = verdict.verdict
    return {
        prompt: (orders[FIRST], orders[SECOND])
        for prompt, orders in by_prompt.items()
        if {FIRST, SECOND} <= orders.keys()
    }
