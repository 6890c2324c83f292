"""The statistics of evaluation: pure functions over columns of numbers, with NumPy alone.

    found = paired_shares(right_new, right_old, clusters=prompt_ids)
    found.difference                       # Interval(value, low, high, n)
    decided(Rule("not_worse", margin=0.05, least_n=200), found.difference).outcome

win_rate        verdicts on pairs of answers, and the share that is won
paired          two systems on the same prompts: difference, interval, p; Holm's rule over tasks
length          the win rate at equal lengths, and a judge's taste for length
power           detectable differences, and how many prompts one needs
decision        pass, fail or undecided
bradley_terry   the strengths of many systems
judge           agreement of a judge with a reference, and its taste for place and length
logistic        the regression behind `length` and `bradley_terry`
observed        columns and clusters, checked

Every figure is an `align.ops.intervals.Interval`, whose n counts clusters: what was drawn independently.
`benchmarks/evals/coverage.py` measures how often the intervals cover and the gates err.
"""

from align.evals.stats.bradley_terry import Strengths, bradley_terry
from align.evals.stats.decision import Decision, Rule, decided
from align.evals.stats.judge import Agreement, JudgeStatistics, Swap, agreement, measure_judge, swap
from align.evals.stats.length import LengthControlled, length_controlled
from align.evals.stats.paired import (
    Paired,
    bounded_difference,
    holm,
    needed_pairs,
    paired_scores,
    paired_shares,
    score_difference,
    share_difference,
    sign_flip,
)
from align.evals.stats.power import cluster_effect, detectable, deviation, needed, needed_share
from align.evals.stats.win_rate import share_won, surviving, win_rate

__all__ = [
    "Agreement",
    "Decision",
    "JudgeStatistics",
    "LengthControlled",
    "Paired",
    "Rule",
    "Strengths",
    "Swap",
    "agreement",
    "bounded_difference",
    "bradley_terry",
    "cluster_effect",
    "decided",
    "detectable",
    "deviation",
    "holm",
    "length_controlled",
    "measure_judge",
    "needed",
    "needed_pairs",
    "needed_share",
    "paired_scores",
    "paired_shares",
    "score_difference",
    "share_difference",
    "share_won",
    "sign_flip",
    "surviving",
    "swap",
    "win_rate",
]
