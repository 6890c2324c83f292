"""Rules that decide pass or fail from the interval of a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.evals.stats.power import compute_sample_size, estimate_deviation
from align.ops.intervals import Interval

RuleKind = Literal["superior", "not_worse", "at_most"]
Outcome = Literal["pass", "fail", "undecided"]


@dataclass(frozen=True, slots=True)
class DecisionRule:
    """A rule that decides pass or fail from the interval of a figure, such as a win rate or a difference.

    Attributes:
        kind: `superior`: above `even` by more than the margin. `not_worse`: below `even` by less than the margin.
            `at_most`: above `even` by less than the margin, for a cost or a share of refusals.
        margin: at least 0, in the figure's unit. It has to be above 0 for `not_worse`: the interval of two equal
            systems lies on both sides of 0, and no number of prompts would show that one is not worse at all.
        level: of the interval that decides. With 0.95, a system nominally passes wrongly in 2.5 % of cases.
        least_n: number of clusters below which nothing is decided.
        even: the figure of two equal systems: 0 for a difference, ½ for a win rate.
    """

    kind: RuleKind
    margin: float = 0.0
    level: float = 0.95
    least_n: int = 1
    even: float = 0.0

    @property
    def bound(self) -> float:
        """The value of the figure that separates fail from pass."""
        return self.even - self.margin if self.kind == "not_worse" else self.even + self.margin


@dataclass(frozen=True, slots=True)
class Look:
    """An evaluation of data that grow from one evaluation to the next.

    Attributes:
        n: number of clusters.
        outcome: by the interval of that evaluation alone.
        data: digest of the compared values.
        figure: what that evaluation decided on.
        level: of the figure's interval.
    """

    n: int
    outcome: Outcome
    data: str
    figure: Interval
    level: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a decision rule on a figure.

    Attributes:
        outcome: `undecided` does not count as a pass.
        figure: the figure that was decided on.
        bound: see `DecisionRule.bound`.
        n_to_decide: if undecided, the number of clusters with which an interval would exclude the bound in four of five
            cases, provided that the figure keeps its value. None for a decided figure, and if no number suffices.
        why: a reason that the figure does not show, or a remark on a decided figure.
        level: of the figure's interval.
        looks: this and all earlier evaluations that decided by a sequential design, in order. Empty without one.
    """

    outcome: Outcome
    figure: Interval
    bound: float
    n_to_decide: int | None
    why: str = ""
    level: float = 0.95
    looks: tuple[Look, ...] = ()


def decide_by_rule(rule: DecisionRule, figure: Interval) -> Decision:
    """Return `pass` if a figure's whole interval lies on the right side of the rule's bound, `fail` if on the wrong
    side, else `undecided`.

    The outcome is `undecided` for a figure without an interval or with fewer clusters than `least_n`, and if the
    interval holds the bound.

    Args:
        figure: with an interval at the rule's level.
    """
    low = figure.low
    high = figure.high
    bound = rule.bound
    if low is None or high is None or figure.n < rule.least_n or low <= bound <= high:
        return Decision("undecided", figure, bound, estimate_n_to_decide(rule, figure), level=rule.level)
    has_passed = high < bound if rule.kind == "at_most" else low > bound
    return Decision("pass" if has_passed else "fail", figure, bound, None, level=rule.level)


def estimate_n_to_decide(rule: DecisionRule, figure: Interval) -> int | None:
    """Estimate the number of clusters at which a rule would decide a figure that keeps its value, see
    `Decision.n_to_decide`. Returns None if no number suffices."""
    sd = estimate_deviation(figure, rule.level)
    if sd is None:  # the variance between clusters is unknown, but the minimum has to be reached
        return rule.least_n if figure.n < rule.least_n else None
    n = compute_sample_size(sd, figure.value - rule.bound, rule.level)
    return None if n is None else max(n, rule.least_n)
