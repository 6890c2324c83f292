"""How small a difference so many prompts can show, and how many prompts a difference needs. Pure functions.

Both follow from the standard deviation of what is averaged: one number a cluster, so that the differences are paired
and the effect of clusters is in it. An interval tells it (`deviation`).
"""

from __future__ import annotations

import math
from statistics import NormalDist

from numpy.typing import ArrayLike

from align.evals.stats.observed import Clusters, cluster_means, columns, places
from align.ops.intervals import Interval, normal_quantile, t_quantile

POWER = 0.8
"""The chance that a true difference of the stated size is found."""
MOST = 10**9
"""Clusters beyond which no number is given."""


def deviation(found: Interval, level: float = 0.95) -> float | None:
    """The standard deviation of one cluster's value that an interval speaks of: √n times half its width by Student's
    quantile. None where there is no interval.

    Args:
        level: of the interval.
    """
    if found.low is None or found.high is None:
        return None
    return math.sqrt(found.n) * (found.high - found.low) / 2 / t_quantile(max(1, found.n - 1), level)


def cluster_effect(values: ArrayLike, clusters: Clusters | None = None) -> float:
    """The variance of a cluster's mean over that of a row: 1/k where the k rows of each cluster are independent, 1
    where they are all alike. It says whether more answers a prompt would help, or only more prompts.

    Args:
        values: one a row, such as paired differences, shape [n].
        clusters: what each row shares with others.

    Raises:
        ValueError: no rows, another number of ids, or a value that is not finite.
    """
    (rows,) = columns(values=values)
    of_rows = float(rows.var())
    return min(1.0, float(cluster_means(places(clusters, rows.size), rows).var()) / of_rows) if of_rows else 1.0


def detectable(sd: float, n: int, level: float = 0.95, power: float = POWER, reach: float = 0.0) -> float:
    """The true difference that n clusters find with this power, where *found* means that the interval lies above 0.

    It is δ = c·σ/√n with c = t + z·√(1 + (t² + (t + z)²) / 2(n−1)), t being Student's quantile at the level and z the
    normal one of the power. The root allows for the standard deviations of both sets, the one that stated δ and the one
    that is to find it, being estimates.

    Where a difference is bounded, σ grows with δ: rows that were ties become wins. Then σ² = sd² + reach·δ − δ², which
    is what it grows to if all of δ is of that kind.

    Source: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences", chapter 2, for c = t + z.

    Args:
        sd: of one cluster's difference between equal systems, as `deviation` has it.
        reach: the largest difference of one row, 1 for shares and ½ for a win rate less ½, times `cluster_effect`; 0
            where there is no bound.

    Raises:
        ValueError: a negative sd or reach, fewer than two clusters, or a power that is not within [½, 1).
    """
    if not (math.isfinite(sd) and sd >= 0 and reach >= 0):
        raise ValueError(f"sd={sd} with reach={reach}: neither may be negative")
    if not 0.5 <= power < 1:
        raise ValueError(f"power={power} is not within [0.5, 1)")
    if n < 2:
        raise ValueError(f"n={n}: at least two clusters are needed to tell how far they vary")
    t, z = t_quantile(n - 1, level), NormalDist().inv_cdf(power)
    square = (t + z * math.sqrt(1 + (t**2 + (t + z) ** 2) / (2 * (n - 1)))) ** 2
    if reach == 0:
        return math.sqrt(square / n) * sd
    # The root of (n + c²)·δ² − c²·reach·δ − c²·sd² = 0.
    half = square * reach / 2
    return (half + math.sqrt(half**2 + (n + square) * square * sd**2)) / (n + square)


def needed(sd: float, distance: float, level: float = 0.95, power: float = POWER, reach: float = 0.0) -> int | None:
    """The fewest clusters that find a true difference of this size; None where it is 0, or takes more than 10⁹.

    Args:
        distance: of either sign.
        sd, reach: as of `detectable`. Where the sd is that of a set which shows the difference, reach is 0.

    Raises:
        ValueError: as of `detectable`.
    """

    def is_found(n: int) -> bool:
        return detectable(sd, n, level, power, reach) <= abs(distance)

    if distance == 0 or not is_found(MOST):
        return None
    low, high = 1, 2
    while not is_found(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_found(middle) else (middle, high)
    return high


def needed_share(p: float, bound: float, dispersion: float = 1.0, level: float = 0.95) -> int | None:
    """The fewest clusters whose share, if it is p, has an interval of Wilson's that leaves a bound in four of five
    cases: (z₁·√(b(1 − b)) + z₂·√(p(1 − p)))² · φ / (p − b)². None where p is the bound, or it takes more than 10⁹.

    Args:
        bound: b, within [0, 1].
        dispersion: φ, the variance of a cluster's value over p(1 − p).
    """
    if p == bound:
        return None
    width = normal_quantile(level) * math.sqrt(bound * (1 - bound)) + _NORMAL_POWER * math.sqrt(p * (1 - p))
    n = math.ceil(dispersion * (width / (p - bound)) ** 2)
    return max(1, n) if n <= MOST else None


_NORMAL_POWER = NormalDist().inv_cdf(POWER)
