"""Whether a figure passes a gate, by its interval: pass, fail, or undecided with the number that would decide."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from align.evals.stats.power import deviation, needed
from align.ops.intervals import Interval

Kind = Literal["superior", "not_worse", "at_most"]
Outcome = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What is asked of a figure.

    Attributes:
        kind: `superior`: above `even` by more than the margin. `not_worse`: below `even` by less than the margin.
            `at_most`: above `even` by less than the margin, as a cost, or a share of refusals.
        margin: at least 0, in the figure's unit. Above 0 for `not_worse`: two equal systems have an interval on both
            sides of 0, and no number of prompts would show that one is not worse at all.
        level: of the interval that decides. One of 0.95 lets a system pass wrongly in 2.5 % of cases.
        least_n: clusters below which nothing is decided.
        even: what the figure is when two systems are equal: 0 of a difference, ½ of a win rate.
    """

    kind: Kind
    margin: float = 0.0
    level: float = 0.95
    least_n: int = 1
    even: float = 0.0

    @property
    def bound(self) -> float:
        """The figure on whose one side it passes."""
        return self.even - self.margin if self.kind == "not_worse" else self.even + self.margin


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of a rule.

    Attributes:
        outcome: `undecided` is no pass.
        figure: what decided, or did not.
        bound: where the figure passes or fails.
        n_to_decide: of what is undecided, the clusters with which an interval would leave the bound in four of five
            cases if the figure is what it seems; None of what is decided, and where no number would do.
        why: the reason where the figure does not say it; of what is decided, what else is to be known.
    """

    outcome: Outcome
    figure: Interval
    bound: float
    n_to_decide: int | None
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def decided(rule: Rule, figure: Interval) -> Decision:
    """Pass where the whole interval lies on the right side of the bound, fail where it lies on the other.

    A figure without an interval, of fewer clusters than the least number, or whose interval holds the bound, is
    undecided.

    Args:
        figure: with an interval at the rule's level.
    """
    low, high, bound = figure.low, figure.high, rule.bound
    if low is None or high is None or figure.n < rule.least_n or low <= bound <= high:
        return Decision("undecided", figure, bound, n_to_decide(rule, figure))
    right = high < bound if rule.kind == "at_most" else low > bound
    return Decision("pass" if right else "fail", figure, bound, None)


def n_to_decide(rule: Rule, figure: Interval) -> int | None:
    """The clusters that would decide; see `Decision`."""
    sd = deviation(figure, rule.level)
    if sd is None:  # nothing is known of how far clusters vary, but some must be there
        return rule.least_n if figure.n < rule.least_n else None
    n = needed(sd, figure.value - rule.bound, rule.level)
    return None if n is None else max(n, rule.least_n)
