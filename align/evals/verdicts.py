"""What judges say of two answers to one prompt: one record, whoever judges. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from align.core.types import Conversation
from align.evals.stats import surviving, win_rate

FIRST, SECOND = "first", "second"
"""The place at which the first system's answer was shown."""


class Pair(NamedTuple):
    """Two answers to one prompt.

    Attributes:
        id: of the item, unlike the others' of its task.
        first, second: the answer of the first system and of the other one, without reasoning that is hidden.
    """

    id: str
    prompt: Conversation
    first: str
    second: str


class Verdict(NamedTuple):
    """What a judge says of a pair, in one order.

    Attributes:
        prompt: the pair's id.
        order: `first` where the first system's answer was shown first, `second` where the other one was; empty where
            the judge sees no order, as scorers.
        verdict: 1 where the first system's answer is better, 0 where the other one is, ½ for a tie.
        p: the judge's probability that the first system's is better; None where it gives none.
        by: who, where several judge.
        error: why there is no verdict, which counts as a tie; empty where there is one.
    """

    prompt: str
    order: str
    verdict: float
    p: float | None = None
    by: str = ""
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As a line of `verdicts.jsonl` has it: without who and why where there are none."""
        made = self._asdict()
        return {key: value for key, value in made.items() if value != "" or key == "order"}


def of_scores(ids: Sequence[str], first: Sequence[float], second: Sequence[float]) -> list[Verdict]:
    """The verdicts of a scorer: the higher score wins. Raises: ValueError: a score is NaN."""
    return [Verdict(id, "", won) for id, won in zip(ids, win_rate(first, second).tolist(), strict=True)]


def settled(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """One verdict for each prompt, in [0, 1]. What one judge says in both orders counts if it is the same, else as a
    tie; of several judges it is the mean."""
    by_judge: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in verdicts:
        by_judge.setdefault((one.prompt, one.by), {}).setdefault(one.order, []).append(one.verdict)
    by_prompt: dict[str, list[float]] = {}
    for (prompt, _), orders in by_judge.items():
        means = [sum(said) / len(said) for said in orders.values()]
        both = FIRST in orders and SECOND in orders
        by_prompt.setdefault(prompt, []).append(
            surviving(means[:1], means[1:]).item() if both else sum(means) / len(means)
        )
    return {prompt: sum(said) / len(said) for prompt, said in by_prompt.items()}


def in_both_orders(verdicts: Iterable[Verdict]) -> Mapping[str, tuple[float, float]]:
    """Of prompts on which one judge gave a verdict in both orders: its verdict in each."""
    found: dict[str, dict[str, float]] = {}
    for one in verdicts:
        if one.error:  # two errors are no consistency
            continue
        found.setdefault(one.prompt, {})[one.order] = one.verdict
    return {prompt: (of[FIRST], of[SECOND]) for prompt, of in found.items() if {FIRST, SECOND} <= of.keys()}
