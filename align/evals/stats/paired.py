"""Paired comparisons of two models: differences with intervals, and p-values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.columns import Clusters, average_clusters, number_clusters, require_within, to_columns
from align.evals.stats.power import MAX_CLUSTERS, POWER_QUANTILE, find_smallest_n
from align.ops.intervals import PRIOR, Interval, mean_interval, normal_quantile, proportion_interval, t_quantile

MAX_ENUMERATED = 13
"""Maximum number n of differences for which the test enumerates all 2ⁿ sign flips. For more, it samples flips."""
SAMPLED_FLIPS = 9_999
"""Number of sampled sign flips. With the observed signs included, the smallest p is 1/10,000."""
DIFFERENCE_PRIOR = PRIOR / 2
"""Strength of the shrinkage of a difference's dispersion towards 1, as a variance summed over clusters."""
MEAN_ROUNDING = 1e-12
"""Largest relative difference of two means that counts as rounding."""
FLIPS_PER_BLOCK = 1_000
"""Number of sign flips that are held in memory at once."""


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """A paired comparison of two models on the same clusters: both means, their difference and its p-value.

    Attributes:
        first, second: the mean of each, with its own interval. The intervals may overlap although the difference is
            significant.
        difference: first − second, paired by cluster.
        p: two-sided, of the hypothesis that swapping the two within a cluster changes nothing.
        better, worse, equal: number of clusters whose difference is above, below and at 0.
    """

    first: Interval
    second: Interval
    difference: Interval
    p: float
    better: int
    worse: int
    equal: int


def compare_shares(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> PairedComparison:
    """Compare two models' outcomes within [0, 1], such as right and wrong, paired by cluster. Returns both means, their
    difference with its interval, and a p-value.

    The interval is Tango's score interval at the effective number of trials, see `compute_share_difference`.

    Args:
        first, second: one outcome per row, shape [n] each. Row i of both answers the same prompt.
        clusters: id of what rows share: the prompt of several answers, or the source of several prompts. Each cluster
            counts once. Without ids, each row is a cluster.

    Raises:
        ValueError: there are no rows, the numbers of rows differ, or a value is outside [0, 1] or not finite.
    """
    first_means, second_means = _compute_cluster_means(first, second, clusters, are_shares=True)
    return _build_comparison(
        proportion_interval(first_means, level=level),
        proportion_interval(second_means, level=level),
        compute_share_difference(first, second, clusters, level),
        _subtract_means(first_means, second_means),
    )


def compare_scores(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> PairedComparison:
    """Compare two models' scores of any range, such as rewards or losses, paired by cluster. Returns both means, their
    difference with its interval, and a p-value.

    Args:
        first, second, clusters: as in `compare_shares`.

    Raises:
        ValueError: there are no rows, the numbers of rows differ, or a value is not finite.
    """
    first_means, second_means = _compute_cluster_means(first, second, clusters, are_shares=False)
    differences = _subtract_means(first_means, second_means)
    return _build_comparison(
        mean_interval(first_means, level),
        mean_interval(second_means, level),
        mean_interval(differences, level),
        differences,
    )


def compute_share_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """Return the difference of two shares, paired by cluster, with Tango's score interval at the effective number of
    trials.

    With w and l the mean wins and losses of a row, averaged over C clusters, the difference is δ = w − l, and a single
    trial has the variance w + l − δ². The dispersion φ is the variance of the C cluster differences divided by that of
    a single trial: 1/k if the k rows of each cluster are independent. Tango's interval is computed for C/φ trials (Rao
    and Scott), with φ shrunk towards 1 by `DIFFERENCE_PRIOR`, so that equal differences still have an interval, and
    with Student's quantile of C − 1 degrees of freedom. φ is set to 1, and the quantile to the normal one, if every
    cluster difference is −1, 0 or 1.

    Sources: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design"; Rao and Scott 1992, "A simple method for the analysis of clustered binary data".

    Args:
        first, second, clusters: as in `compare_shares`.

    Raises:
        ValueError: as in `compare_shares`.
    """
    outcomes = _measure_paired_outcomes(first, second, clusters)
    return _compute_tango_interval(outcomes, outcomes.clusters, level)


def compute_sample_size_for_pairs(
    first: ArrayLike, second: ArrayLike, bound: float, clusters: Clusters | None = None, level: float = 0.95
) -> int | None:
    """Return the smallest number of clusters whose `compute_share_difference` would exclude `bound` in four of five
    cases, at the observed win and loss shares and dispersion.

    That is the number with which the interval just excludes the bound, times ((z₁ + z₂)/z₁)², as for a mean. The factor
    is 1 if no cluster differs, since none is expected to. Returns None if the difference is at the bound, or if more
    than 10⁹ clusters are needed.

    Args:
        first, second, clusters: as in `compare_shares`.
    """
    outcomes = _measure_paired_outcomes(first, second, clusters)
    z = normal_quantile(level)
    power_factor = ((z + POWER_QUANTILE) / z) ** 2 if outcomes.wins or outcomes.losses else 1.0

    def excludes_bound(n: int) -> bool:
        interval = _compute_tango_interval(outcomes, n, level)
        assert interval.low is not None
        assert interval.high is not None
        return not interval.low <= bound <= interval.high

    n = find_smallest_n(excludes_bound, 0, MAX_CLUSTERS)
    return None if n is None else math.ceil(n * power_factor)


def _bisect_boundary(is_beyond: Callable[[float], bool], inside: float, outside: float) -> float:
    """Find by bisection the point between `inside` and `outside` from which `is_beyond` holds. Returns `outside` if the
    condition does not hold there either."""
    if not is_beyond(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        if is_beyond(middle):
            outside = middle
        else:
            inside = middle
    return inside


def compute_score_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """Return only the difference of `compare_scores`, with the interval of `mean_interval` and no p-value. The
    interval has no ends if all differences are equal up to rounding, since then nothing bounds the next one."""
    return mean_interval(_subtract_means(*_compute_cluster_means(first, second, clusters, are_shares=False)), level)


def _compute_cluster_means(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None, are_shares: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each cluster's mean outcome of the first and of the second model, shape [C] each."""
    first_column, second_column = to_columns(first=first, second=second)
    if are_shares:
        require_within(0, 1, first=first_column, second=second_column)
    cluster_numbers = number_clusters(clusters, first_column.size)
    return average_clusters(cluster_numbers, first_column), average_clusters(cluster_numbers, second_column)


def _subtract_means(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return first − second, and 0 where the two are equal up to rounding."""
    return np.where(np.isclose(first, second, rtol=MEAN_ROUNDING, atol=0), 0.0, first - second)


class PairedOutcomes(NamedTuple):
    """The wins and losses of one model against another, as means over clusters.

    Attributes:
        wins, losses: mean win and mean loss of a row.
        dispersion: variance of the clusters' differences divided by that of single trials, see
            `compute_share_difference`.
        is_estimated: whether the dispersion is an estimate.
        clusters: number of clusters.
    """

    wins: float
    losses: float
    dispersion: float
    is_estimated: bool
    clusters: int


def _measure_paired_outcomes(first: ArrayLike, second: ArrayLike, clusters: Clusters | None) -> PairedOutcomes:
    first_column, second_column = to_columns(first=first, second=second)
    require_within(0, 1, first=first_column, second=second_column)
    cluster_numbers = number_clusters(clusters, first_column.size)
    cluster_wins = average_clusters(cluster_numbers, np.maximum(first_column - second_column, 0))
    cluster_losses = average_clusters(cluster_numbers, np.maximum(second_column - first_column, 0))
    wins = float(cluster_wins.mean())
    losses = float(cluster_losses.mean())
    cluster_differences = cluster_wins - cluster_losses
    n = cluster_differences.size
    if np.isin(cluster_differences, (-1.0, 0.0, 1.0)).all():
        return PairedOutcomes(wins, losses, 1.0, False, n)
    if n == 1:
        return PairedOutcomes(wins, losses, 1.0, True, n)
    trial_variance = wins + losses - (wins - losses) ** 2
    variance = float(cluster_differences.var(ddof=1))
    dispersion = (n * variance + DIFFERENCE_PRIOR) / (n * trial_variance + DIFFERENCE_PRIOR)
    return PairedOutcomes(wins, losses, dispersion, True, n)


def _compute_tango_interval(outcomes: PairedOutcomes, clusters: int, level: float) -> Interval:
    """Return the mean difference δ̂ with Tango's score interval, as a number of clusters would give it.

    It holds all δ with |δ̂ − δ| ≤ z·√((2q + δ(1 − δ)) / trials), where q is the likeliest share of losses under δ.
    """
    trials = clusters / outcomes.dispersion
    win_sum = outcomes.wins * trials
    loss_sum = outcomes.losses * trials
    value = outcomes.wins - outcomes.losses
    z = t_quantile(max(1, clusters - 1), level) if outcomes.is_estimated else normal_quantile(level)

    def is_beyond(delta: float) -> bool:
        """Return whether the observed differences reject a true difference of δ."""
        middle = -win_sum - loss_sum + (2 * trials - win_sum + loss_sum) * delta
        root = math.sqrt(max(0.0, middle * middle + 8 * trials * loss_sum * delta * (1 - delta)))
        spread = trials * ((root - middle) / (2 * trials) + delta * (1 - delta))
        return abs(win_sum - loss_sum - trials * delta) > z * math.sqrt(max(0.0, spread))

    low = _bisect_boundary(is_beyond, value, -1.0)
    return Interval(value, low, _bisect_boundary(is_beyond, value, 1.0), outcomes.clusters)


def _build_comparison(
    first: Interval, second: Interval, difference: Interval, differences: NDArray[np.float64]
) -> PairedComparison:
    better = int((differences > 0).sum())
    worse = int((differences < 0).sum())
    return PairedComparison(
        first, second, difference, compute_sign_flip_p(differences), better, worse, differences.size - better - worse
    )


def compute_sign_flip_p(differences: ArrayLike) -> float:
    """Return the two-sided p-value of Fisher's sign-flip test that the mean difference is 0. It is the share of sign
    flips with |Σ ±d| at least |Σ d|.

    If the systems are equal, each cluster's difference is as likely to have the other sign, for any dependence
    between the rows of a cluster. So the test is exact with clusters, while McNemar's on single rows is not. If all
    non-zero differences have one size, it is McNemar's exact test, from the binomial distribution. Otherwise up to 2¹³
    flips are enumerated, and for more differences a sample of 9,999 is drawn with a fixed seed.

    Sources: Fisher 1935, "The Design of Experiments", section 21; McNemar 1947, "Note on the sampling error of the
    difference between correlated proportions"; Phipson and Smyth 2010, "Permutation p-values should never be zero".

    Args:
        differences: one per cluster, shape [C].

    Raises:
        ValueError: there are no differences, or one is not finite.
    """
    (column,) = to_columns(differences=differences)
    d = column[column != 0]
    if not d.size:
        return 1.0
    if np.ptp(np.abs(d)) == 0:
        return compute_binomial_p(int((d > 0).sum()), d.size)
    observed = abs(float(d.sum())) - 1e-9 * float(np.abs(d).sum())  # sums that are equal but for rounding count
    if d.size <= MAX_ENUMERATED:
        signs = 1 - 2 * ((np.arange(1 << d.size)[:, None] >> np.arange(d.size)) & 1)
        return float((np.abs(signs @ d) >= observed).mean())
    rng = np.random.default_rng(0)
    extreme = 0
    width = -(-d.size // 8)
    for start in range(0, SAMPLED_FLIPS, FLIPS_PER_BLOCK):
        rows = min(FLIPS_PER_BLOCK, SAMPLED_FLIPS - start)
        bits = np.frombuffer(rng.bytes(rows * width), np.uint8).reshape(rows, width)
        flipped = np.unpackbits(bits, axis=1, count=d.size).astype(np.float64)
        extreme += int((np.abs(d.sum() - 2 * (flipped @ d)) >= observed).sum())
    return (extreme + 1) / (SAMPLED_FLIPS + 1)


def compute_binomial_p(heads: int, throws: int) -> float:
    """Return the two-sided p-value of `heads` in `throws` of a fair coin: twice the smaller tail, at most 1."""
    log_half = throws * math.log(2)
    log_all = math.lgamma(throws + 1)
    tail = sum(
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(throws - k + 1) - log_half)
        for k in range(min(heads, throws - heads) + 1)
    )
    return min(1.0, 2 * tail)


def adjust_by_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return task → p-value adjusted for multiple testing by Holm's step-down rule.

    Rejecting the tasks with an adjusted p of at most `a` bounds the probability of any false rejection by `a`, for any
    dependence between the tasks. The k-th smallest of m is max over j ≤ k of (m − j + 1)·p₍ⱼ₎, at most 1.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: by task, in any order, which is kept.

    Raises:
        ValueError: a p is not within [0, 1].
    """
    for task, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p={p} of {task!r} is not within [0, 1]")
    order = sorted(p_values, key=p_values.__getitem__)
    raised = accumulate((min(1.0, (len(order) - j) * p_values[task]) for j, task in enumerate(order)), max)
    adjusted = dict(zip(order, raised, strict=True))
    return {task: adjusted[task] for task in p_values}
