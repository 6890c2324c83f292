"""The verdicts of judges on pairs of answers and on single answers: one record for every judge. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from align.core.types import Conversation
from align.evals.stats import compute_wins, merge_swapped_verdicts

FIRST = "first"
"""The first system's answer is shown first."""
SECOND = "second"
"""The first system's answer is shown second."""


class AnswerPair(NamedTuple):
    """Two answers to one prompt.

    Attributes:
        id: of the item, unique in its task.
        first, second: the answers of the first system and of the other one, without hidden reasoning.
    """

    id: str
    prompt: Conversation
    first: str
    second: str


class JudgeVerdict(NamedTuple):
    """The verdict of a judge on a pair in one order, or on one answer.

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
        """Return the verdict as in a line of `verdicts.jsonl`, without empty fields except the order."""
        return {key: value for key, value in self._asdict().items() if value != "" or key == "order"}


def judge_by_scores(ids: Sequence[str], first: Sequence[float], second: Sequence[float]) -> list[JudgeVerdict]:
    """Turn the scores of two answers to each prompt into verdicts: the higher score wins. Raises ValueError if a score
    is NaN."""
    return [JudgeVerdict(id, "", win) for id, win in zip(ids, compute_wins(first, second).tolist(), strict=True)]


def merge_verdicts(verdicts: Iterable[JudgeVerdict]) -> dict[str, float]:
    """Merge the verdicts on each prompt into one in [0, 1]. Two verdicts of one judge in both orders count if they are
    equal, else as a tie. Those of several judges are averaged."""
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
    """Return the two verdicts on each prompt that was judged in both orders of the answers. Verdicts with an error are
    left out."""
    by_prompt: dict[str, dict[str, float]] = {}
    for verdict in verdicts:
        if not verdict.error:
            by_prompt.setdefault(verdict.prompt, {})[verdict.order] = verdict.verdict
    return {
        prompt: (orders[FIRST], orders[SECOND])
        for prompt, orders in by_prompt.items()
        if {FIRST, SECOND} <= orders.keys()
    }
