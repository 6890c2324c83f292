"""Sample sizes, and the differences that a sample detects."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from numpy.typing import ArrayLike

from align.evals.stats.columns import Clusters, average_clusters, number_clusters, to_columns
from align.ops.intervals import Interval, normal_quantile, t_quantile

POWER = 0.8
"""Probability with which a sample size detects a true difference."""
POWER_QUANTILE = NormalDist().inv_cdf(POWER)
MAX_CLUSTERS = 10**9
"""Largest sample size that is reported. Functions return None above it."""


def estimate_deviation(figure: Interval, level: float = 0.95) -> float | None:
    """Estimate the standard deviation between clusters from a mean's interval: √n times half its width, divided by
    Student's quantile. It is too large for skewed values, whose intervals are wider. Returns None if there is no
    interval.

    Args:
        level: of the interval.
    """
    if figure.low is None or figure.high is None:
        return None
    return math.sqrt(figure.n) * (figure.high - figure.low) / 2 / t_quantile(max(1, figure.n - 1), level)


def compute_cluster_effect(values: ArrayLike, clusters: Clusters | None = None) -> float:
    """Return the variance of the cluster means divided by the variance of the rows.

    It is 1/k if the k rows of each cluster are independent, and 1 if they are all alike. A value near 1 means that more
    answers per prompt would not help, only more prompts would.

    Args:
        values: one per row, such as paired differences, shape [n].
        clusters: id of each row's cluster.

    Raises:
        ValueError: there are no rows, the number of ids differs, or a value is not finite.
    """
    (rows,) = to_columns(values=values)
    row_variance = float(rows.var())
    if not row_variance:
        return 1.0
    mean_variance = float(average_clusters(number_clusters(clusters, rows.size), rows).var())
    return min(1.0, mean_variance / row_variance)


def compute_detectable_difference(
    sd: float, n: int, level: float = 0.95, power: float = POWER, reach: float = 0.0
) -> float:
    """Return the smallest true difference that n clusters detect with probability `power`. Detected means that the
    difference's interval lies above 0.

    It is δ = c·σ/√n with c = t + z·√(1 + (t² + (t + z)²) / 2(n−1)), where t is Student's quantile at the level and z
    the normal quantile of the power. The root accounts for both standard deviations being estimates: that of the set
    that states δ, and that of the set that is to detect it.

    If a difference is bounded, σ grows with δ, because rows that were ties become wins. Then σ² = sd² + reach·δ − δ²,
    the value for which all of δ is of that kind.

    Source: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences", chapter 2, for c = t + z.

    Args:
        sd: standard deviation of one cluster's difference between equal systems, see `estimate_deviation`.
        reach: the largest difference of one row, which is 1 for shares and ½ for a win rate less ½, times
            `compute_cluster_effect`. 0 if there is no bound.

    Raises:
        ValueError: sd or reach is negative, there are fewer than two clusters, or the power is not within [½, 1).
    """
    if not (math.isfinite(sd) and sd >= 0 and reach >= 0):
        raise ValueError(f"sd={sd} with reach={reach}: neither may be negative")
    if not 0.5 <= power < 1:
        raise ValueError(f"power={power} is not within [0.5, 1)")
    if n < 2:
        raise ValueError(f"n={n}: at least two clusters are needed to tell how far they vary")
    t = t_quantile(n - 1, level)
    z = NormalDist().inv_cdf(power)
    square = (t + z * math.sqrt(1 + (t**2 + (t + z) ** 2) / (2 * (n - 1)))) ** 2
    if reach == 0:
        return math.sqrt(square / n) * sd
    # The root of (n + c²)·δ² − c²·reach·δ − c²·sd² = 0.
    half = square * reach / 2
    return (half + math.sqrt(half**2 + (n + square) * square * sd**2)) / (n + square)


def compute_sample_size(
    sd: float, distance: float, level: float = 0.95, power: float = POWER, reach: float = 0.0
) -> int | None:
    """Return the smallest number of clusters that detects a true difference of size `distance` with probability
    `power`. Returns None if the difference is 0, or if more than 10⁹ clusters are needed.

    Args:
        distance: of either sign.
        sd, reach: see `compute_detectable_difference`. If the sd is that of a set which shows the difference, reach is
            0.

    Raises:
        ValueError: as in `compute_detectable_difference`.
    """

    def is_detected(n: int) -> bool:
        return compute_detectable_difference(sd, n, level, power, reach) <= abs(distance)

    return find_smallest_n(is_detected, 1, MAX_CLUSTERS) if distance else None


def find_smallest_n(is_enough: Callable[[int], bool], above: int, highest: int) -> int | None:
    """Return the smallest n from `above + 1` to `highest` that is enough, or None if `highest` is not.

    Args:
        is_enough: a condition that holds for all n from some n on.
    """
    low = above
    high = min(max(1, 2 * above), highest)
    while not is_enough(high):
        if high == highest:
            return None
        low = high
        high = min(2 * high, highest)
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high


def compute_sample_size_for_share(p: float, bound: float, dispersion: float = 1.0, level: float = 0.95) -> int | None:
    """Return the smallest number of clusters with which Wilson's interval of a share `p` excludes `bound` in four of
    five cases. It is (z₁·√(b(1 − b)) + z₂·√(p(1 − p)))² · φ / (p − b)².

    Returns None if p is the bound, or if more than 10⁹ clusters are needed.

    Args:
        bound: b, within [0, 1].
        dispersion: φ, the variance of a cluster's value over p(1 − p).
    """
    if p == bound:
        return None
    width = normal_quantile(level) * math.sqrt(bound * (1 - bound)) + POWER_QUANTILE * math.sqrt(p * (1 - p))
    n = math.ceil(dispersion * (width / (p - bound)) ** 2)
    return max(1, n) if n <= MAX_CLUSTERS else None
