"""The statistics of evaluation: pure functions over columns of numbers, with NumPy alone.

    result = paired_shares(right_new, right_old, clusters=prompt_ids)
    result.difference                      # Interval(value, low, high, n)
    decided(Rule("not_worse", margin=0.05, least_n=200), result.difference).outcome

Every figure is an `align.ops.intervals.Interval`, whose n counts clusters: what was drawn independently.
`benchmarks/evals/coverage.py` measures how often the intervals cover and the gates err.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.core.errors import InputError
from align.ops.agreement import cohen_kappas, compute_coefficient_interval
from align.ops.intervals import (
    PRIOR,
    Interval,
    mean_interval,
    normal_quantile,
    proportion_interval,
    t_quantile,
    wilson_interval,
)

Clusters = Sequence[Hashable]
"""One id a row; rows that share one, such as answers to one prompt, depend on each other."""


def columns(**given: ArrayLike) -> list[NDArray[np.float64]]:
    """Columns of one length n ≥ 1 as float64, in the order given; shape [n] each.

    Raises:
        ValueError: a column is empty or no list of numbers, holds NaN or an infinite number, or has another length
            than the first; the message names it.
    """
    found = {name: np.asarray(values, dtype=np.float64) for name, values in given.items()}
    first = next(iter(found))
    for name, column in found.items():
        if column.ndim != 1 or column.size == 0:
            raise ValueError(f"{name} has shape {column.shape}: one number a row is expected, and at least one row")
        if column.size != (rows := found[first].size):
            raise ValueError(f"{name} has {column.size} rows and {first} has {rows}: they must be the same")
        if not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column))[0])
            raise ValueError(f"{name} is {column[row]} in row {row}: a finite number is expected")
    return list(found.values())


def within(low: float, high: float, **given: NDArray[np.float64]) -> None:
    """Refuse columns with a number outside [low, high].

    Raises:
        ValueError: it names the column, the row and the number.
    """
    for name, column in given.items():
        outside = np.flatnonzero((column < low) | (column > high))
        if outside.size:
            raise ValueError(f"{name} is {column[outside[0]]} in row {outside[0]}, which is outside {low} to {high}")


def places(clusters: Clusters | None, rows: int) -> NDArray[np.int64]:
    """The number of each row's cluster, 0 … C−1 in order of first appearance, shape [rows]; without clusters each row
    is one of its own.

    Raises:
        ValueError: there are more or fewer ids than rows.
    """
    if clusters is None:
        return np.arange(rows)
    if len(clusters) != rows:
        raise ValueError(f"{len(clusters)} cluster ids for {rows} rows: one a row is expected")
    place = {id: i for i, id in enumerate(dict.fromkeys(clusters))}
    return np.array([place[id] for id in clusters], dtype=np.int64)


def cluster_means(at: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each cluster's values, shape [C]."""
    return np.bincount(at, weights=values) / np.bincount(at)


def win_rate(score_policy: ArrayLike, score_ref: ArrayLike) -> NDArray[np.float64]:
    """Per prompt 1 where the policy's answer scored higher, 0 where lower, ½ where exactly equal; shape [n].

    The mean is the win rate, ties counted as half, so that a policy compared with itself wins exactly ½.
    """
    policy = np.asarray(score_policy, dtype=np.float64)
    ref = np.asarray(score_ref, dtype=np.float64)
    if policy.shape != ref.shape:
        raise ValueError(f"shapes {policy.shape} and {ref.shape} differ: one number a prompt is expected from each")
    if np.isnan(policy).any() or np.isnan(ref).any():
        raise ValueError("a score is NaN: it neither wins nor loses")
    return np.where(policy > ref, 1.0, np.where(policy < ref, 0.0, 0.5))


def share_won(verdicts: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Interval:
    """The win rate of the first system, a tie counted as half, with Wilson's interval at the effective number of
    clusters; see `align.ops.intervals.proportion_interval`.

    Args:
        verdicts: 1, ½, 0, or means of such, shape [n].
        clusters: the prompt, or what prompts share, of each verdict. Each cluster counts once.

    Raises:
        ValueError: no verdicts, one that is outside [0, 1] or not finite, or another number of ids.
    """
    (won,) = columns(verdicts=verdicts)
    within(0, 1, verdicts=won)
    return proportion_interval(cluster_means(places(clusters, won.size), won), level=level)


def surviving(verdicts: ArrayLike, swapped: ArrayLike) -> NDArray[np.float64]:
    """The verdicts that stand in both orders; one that changes with the order is a tie, ½. Shape [n].

    Args:
        verdicts, swapped: on the same pairs, shown in either order; 1 is for the first *system* in both.

    Raises:
        ValueError: a verdict is outside [0, 1] or not finite, or the lengths differ.
    """
    one, other = columns(verdicts=verdicts, swapped=swapped)
    within(0, 1, verdicts=one, swapped=other)
    return np.where(one == other, one, 0.5)


STEPS = 100
SMALL = 1e-9
"""A Newton step whose largest part is below this ends the fit: it squares from one step to the next."""


class Fit(NamedTuple):
    """Coefficients and their uncertainty.

    Attributes:
        coefficients: log-odds, shape [k].
        model: their covariance if rows were independent and the model held, H⁻¹, shape [k, k].
        sandwich: their covariance over clusters, H⁻¹ M H⁻¹, shape [k, k]; nan for a single cluster.
    """

    coefficients: NDArray[np.float64]
    model: NDArray[np.float64]
    sandwich: NDArray[np.float64]


def fitted(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: NDArray[np.float64],
    at: NDArray[np.int64],
    ridge: NDArray[np.float64],
) -> Fit:
    """The maximum of Σ w·(y ln p + (1−y) ln(1−p)) − Σ ridge·β²/2 with p = 1/(1 + e^(−xβ)), by Newton's method.

    The covariance over clusters is Liang and Zeger's (1986, "Longitudinal data analysis using generalized linear
    models"): M = C/(C−1) Σ s sᵀ over the score s of each of C clusters. It needs no model of what ties a cluster's rows
    to each other, nor of the ties at ½, which vary less than single trials do.

    Args:
        x: shape [n, k].
        y: verdicts within [0, 1], shape [n].
        weights: of rows, shape [n].
        at: number of each row's cluster, shape [n].
        ridge: of coefficients, shape [k]; above 0 where the data alone may leave a coefficient without bound.
    """
    beta = np.zeros(x.shape[1])
    value = penalised(x, y, weights, ridge, beta)
    for _ in range(STEPS):
        p = probability(x @ beta)
        gradient = x.T @ (weights * (y - p)) - ridge * beta
        step = np.linalg.solve(curvature(x, weights, ridge, p), gradient)
        if np.abs(step).max() < SMALL:
            break
        while penalised(x, y, weights, ridge, beta + step) < value and np.abs(step).max() > SMALL:
            step = step / 2  # far from the maximum a whole step may pass it
        beta = beta + step
        value = penalised(x, y, weights, ridge, beta)
    p = probability(x @ beta)
    model = np.linalg.inv(curvature(x, weights, ridge, p)).astype(np.float64)
    scores = np.zeros((int(at.max()) + 1, x.shape[1]))
    np.add.at(scores, at, x * (weights * (y - p))[:, None])
    clusters = len(scores)
    meat = scores.T @ scores * (clusters / (clusters - 1) if clusters > 1 else np.nan)
    return Fit(beta, model, model @ meat @ model)


def probability(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """1/(1 + e^(−x)) without overflow."""
    return np.exp(-np.logaddexp(0, -log_odds))


def penalised(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: NDArray[np.float64],
    ridge: NDArray[np.float64],
    beta: NDArray[np.float64],
) -> float:
    odds = x @ beta
    return float(weights @ (y * odds - np.logaddexp(0, odds)) - ridge @ beta**2 / 2)


def curvature(
    x: NDArray[np.float64], weights: NDArray[np.float64], ridge: NDArray[np.float64], p: NDArray[np.float64]
) -> NDArray[np.float64]:
    return x.T @ (x * (weights * p * (1 - p))[:, None]) + np.diag(ridge)


def variance(sandwich: float, model: float) -> float:
    """The variance of a log-odds: that over clusters, its ratio to the model's drawn towards 1 by `PRIOR` as in
    `align.ops.intervals.proportion_interval`, so that unanimous verdicts still have an interval."""
    dispersion = (sandwich / model / model + PRIOR) / (1 / model + PRIOR)
    return float(model * dispersion)


RIDGE = 0.1
"""On a slope or a strength, as a normal prior of standard deviation 3.2 log-odds. It bounds the slope if length alone
tells wins from losses, and takes 0.2 % off it at 512 verdicts; it bounds a system that wins or loses all."""


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """A win rate with and without what length does to it.

    Attributes:
        raw: the win rate, ties counted as half.
        controlled: the same at equal lengths.
        slope: the log-odds that one standard deviation of the lengths' log ratio adds: 0 is no taste for length, above
            0 longer answers win more often. None of its ends where length cannot be told from worth.
    """

    raw: Interval
    controlled: Interval
    slope: Interval


def length_controlled(
    verdicts: ArrayLike,
    first_lengths: ArrayLike,
    second_lengths: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> LengthControlled:
    """Fit P(first wins) = 1/(1 + e^−(θ + φ·x)) with x = arctan(r/s), r = ln((1 + first)/(1 + second)) and s the
    standard deviation of r. The controlled win rate is 1/(1 + e^−θ).

    The variance of θ is that over clusters; from it follows an effective number of verdicts, and from that Wilson's
    interval. Where all verdicts are equal, or the ratio of lengths is one number other than 1, length cannot be told
    from worth: the first keeps the interval of its win rate, the second has [0, 1] for its interval.

    Source: Dubois, Galambosi, Liang and Hashimoto 2024, "Length-Controlled AlpacaEval". They take x = tanh(d/s) of the
    difference d. Over judges of six tastes the arctangent of the ratio errs less (docs/decisions.md), and its slope is
    in log-odds a standard deviation where lengths are nearly equal. The difficulty of each prompt, which they
    estimate from other systems, is left out.

    Args:
        verdicts: 1, ½ or 0, shape [n]; 1 is for the first.
        first_lengths, second_lengths: of the two answers, in tokens or characters, at least 0, shape [n] each.
        clusters: the prompt, or what prompts share, of each verdict. Each cluster counts once.

    Raises:
        ValueError: no rows, numbers of rows that differ, a verdict outside [0, 1], a length below 0, or a value that is
            not finite.
    """
    y, first, second = columns(verdicts=verdicts, first_lengths=first_lengths, second_lengths=second_lengths)
    within(0, 1, verdicts=y)
    within(0, np.inf, first_lengths=first, second_lengths=second)
    at = places(clusters, y.size)
    raw = proportion_interval(cluster_means(at, y), level=level)
    ratio = np.log1p(first) - np.log1p(second)
    spread = float(ratio.std())
    if np.ptp(y) == 0 or not ratio.any():
        return LengthControlled(raw, raw, Interval(0.0, None, None, raw.n))
    if spread < 1e-9 * float(np.abs(ratio).max()):
        return LengthControlled(raw, Interval(raw.value, 0.0, 1.0, raw.n), Interval(0.0, None, None, raw.n))
    return LengthControlled(raw, *_fitted(y, np.arctan(ratio / spread), at, level))


def _fitted(
    y: NDArray[np.float64], x: NDArray[np.float64], at: NDArray[np.int64], level: float
) -> tuple[Interval, Interval]:
    """The win rate at x = 0, and the slope."""
    weights = 1 / np.bincount(at)[at]
    fit = fitted(np.column_stack([np.ones(y.size), x]), y, weights, at, np.array([0.0, RIDGE]))
    clusters = int(at.max()) + 1
    slope = float(fit.coefficients[1])
    p = float(probability(fit.coefficients[:1])[0])
    if clusters < 3:  # than coefficients and one
        return Interval(p, 0.0, 1.0, clusters), Interval(slope, None, None, clusters)
    quantile = t_quantile(clusters - 2, level)
    of_theta, of_slope = (variance(fit.sandwich[k, k], fit.model[k, k]) for k in (0, 1))
    low, high = wilson_interval(p, 1 / (p * (1 - p) * of_theta), quantile)
    half = quantile * of_slope**0.5
    return Interval(p, low, high, clusters), Interval(slope, slope - half, slope + half, clusters)


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


ENUMERATED = 13
"""Differences whose 2¹³ flips are all counted; of more, a sample is drawn."""
FLIPS = 9_999
"""Random flips; with what was observed, the smallest p is 1/10,000."""
DIFFERENCE_PRIOR = PRIOR / 2
"""For `proportion_interval` of differences. They lie on both sides of the middle, where few of them say more than few
failures do. By simulation, 32 prompts of four answers cover 0.93 to 0.983; with `PRIOR` up to 0.994, with a quarter of
it 0.907 upwards."""
BLOCK = 1_000
"""Flips of all signs held in memory at once."""


@dataclass(frozen=True, slots=True)
class Paired:
    """The first system beside the second.

    Attributes:
        first, second: the mean of each, with its own interval. These may overlap where the difference is clear.
        difference: first − second, paired by cluster.
        p: two-sided, of the hypothesis that swapping the two within a cluster changes nothing.
        better, worse, equal: clusters whose difference is above, below and at 0.
    """

    first: Interval
    second: Interval
    difference: Interval
    p: float
    better: int
    worse: int
    equal: int


def paired_shares(first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Paired:
    """Compare outcomes within [0, 1], such as right and wrong.

    Where every cluster's difference d is −1, 0 or 1, it has Tango's score interval. Elsewhere (d + 1)/2 is a share: it
    has Wilson's interval at the effective number of clusters, also where all are equal.

    Args:
        first, second: one outcome a row, shape [n] each; row i of both answers one prompt.
        clusters: what each row shares with others: the prompt of several answers, the source of several prompts. Each
            cluster counts once. Without, each row is one.

    Raises:
        ValueError: no rows, numbers of rows that differ, or a value that is outside [0, 1] or not finite.
    """
    a, b = _means(first, second, clusters, shares=True)
    return _paired(
        proportion_interval(a, level=level), proportion_interval(b, level=level), _of_shares(a - b, level), a - b
    )


def paired_scores(first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Paired:
    """Compare scores of any range, such as rewards, losses or grades.

    Args:
        first, second, clusters: as of `paired_shares`.

    Raises:
        ValueError: no rows, numbers of rows that differ, or a value that is not finite.
    """
    a, b = _means(first, second, clusters, shares=False)
    return _paired(mean_interval(a, level), mean_interval(b, level), mean_interval(a - b, level), a - b)


def share_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """The difference of `paired_shares` alone, which is all that a gate asks for; p takes most of the time.

    See `paired_shares`.
    """
    a, b = _means(first, second, clusters, shares=True)
    return _of_shares(a - b, level)


def bounded_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """The same with Tango's interval whatever the differences are: what a gate asks, whose bound may lie where the
    variance of few differences says nothing. Of fractions it is wider than it need be."""
    a, b = _means(first, second, clusters, shares=True)
    return _tango(a - b, level)


def needed_pairs(
    first: ArrayLike, second: ArrayLike, bound: float, clusters: Clusters | None = None, level: float = 0.95
) -> int | None:
    """The fewest clusters whose `bounded_difference` would leave a bound in four of five cases if as large a share of
    them is won and lost: those with which it just leaves it, times ((z₁ + z₂)/z₁)², as for a mean. Where no cluster
    differs none is expected to, and nothing is left to chance. None where the difference is at the bound, or it takes
    more than 10⁹.

    Args:
        first, second, clusters: as of `paired_shares`.
    """
    a, b = _means(first, second, clusters, shares=True)
    d = a - b
    won, lost = float(np.maximum(d, 0).mean()), float(np.maximum(-d, 0).mean())
    z = normal_quantile(level)
    chance = ((z + normal_quantile(2 * POWER - 1)) / z) ** 2 if won or lost else 1.0

    def leaves(n: int) -> bool:
        found = _tango_of(won * n, lost * n, n, level)
        assert found.low is not None
        assert found.high is not None
        return not found.low <= bound <= found.high

    most = 1
    while not leaves(most):
        if (most := 2 * most) > MOST:
            return None
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if leaves(middle) else (middle, most)
    return math.ceil(most * chance)


def _end(beyond: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where it begins to hold, between a point inside and one outside; the latter, where it never does."""
    if not beyond(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if beyond(middle) else (middle, outside)
    return inside


def score_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """The difference of `paired_scores` alone, with Student's interval over clusters. Where all differences are equal
    there is none: nothing bounds the next one."""
    a, b = _means(first, second, clusters, shares=False)
    return mean_interval(a - b, level)


def _means(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None, shares: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each cluster's mean outcome of either system, shape [C] each."""
    one, other = columns(first=first, second=second)
    if shares:
        within(0, 1, first=one, second=other)
    at = places(clusters, one.size)
    return cluster_means(at, one), cluster_means(at, other)


def _of_shares(d: NDArray[np.float64], level: float) -> Interval:
    if np.isin(d, (-1.0, 0.0, 1.0)).all():
        return _tango(d, level)
    share = proportion_interval(np.clip((d + 1) / 2, 0, 1), level=level, prior=DIFFERENCE_PRIOR)
    assert share.low is not None  # a share always has an interval
    assert share.high is not None
    return Interval(float(d.mean()), 2 * share.low - 1, 2 * share.high - 1, d.size)


def _tango(d: NDArray[np.float64], level: float) -> Interval:
    return _tango_of(float(d[d > 0].sum()), float(-d[d < 0].sum()), d.size, level)


def _tango_of(won: float, lost: float, n: int, level: float) -> Interval:
    """Of n differences, b the sum of those above 0 and c of those below, it holds all δ with
    |b − c − nδ| ≤ z·√(n·(2q + δ(1 − δ))), q being the likeliest share of losses under δ.

    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design".
    """
    value, z = (won - lost) / n, normal_quantile(level)

    def beyond(delta: float) -> bool:
        """Whether the differences are too far from δ."""
        middle = -won - lost + (2 * n - won + lost) * delta
        root = math.sqrt(max(0.0, middle * middle + 8 * n * lost * delta * (1 - delta)))
        spread = n * ((root - middle) / (2 * n) + delta * (1 - delta))
        return abs(won - lost - n * delta) > z * math.sqrt(max(0.0, spread))

    return Interval(value, _end(beyond, value, -1.0), _end(beyond, value, 1.0), n)


def _paired(first: Interval, second: Interval, difference: Interval, d: NDArray[np.float64]) -> Paired:
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    return Paired(first, second, difference, sign_flip(d), better, worse, d.size - better - worse)


def sign_flip(differences: ArrayLike) -> float:
    """The two-sided p of Fisher's test by flips of signs: how often |Σ ±d| is at least |Σ d|.

    If the systems are equal, each cluster's difference is as likely to have the other sign, whatever ties the rows of a
    cluster to each other. So the test is exact with clusters, where McNemar's on single rows is not. Where all
    differences that are not 0 have one size it is McNemar's exact test, from the binomial distribution. Otherwise up
    to 2¹³ flips are counted, and of more a sample of 9,999 is drawn with a fixed seed.

    Sources: Fisher 1935, "The Design of Experiments", section 21; McNemar 1947, "Note on the sampling error of the
    difference between correlated proportions"; Phipson and Smyth 2010, "Permutation p-values should never be zero".

    Args:
        differences: one a cluster, shape [C].

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    (given,) = columns(differences=differences)
    d = given[given != 0]
    if not d.size:
        return 1.0
    if np.ptp(np.abs(d)) == 0:
        return binomial_p(int((d > 0).sum()), d.size)
    observed = abs(float(d.sum())) - 1e-9 * float(np.abs(d).sum())  # sums that are equal but for rounding count
    if d.size <= ENUMERATED:
        signs = 1 - 2 * ((np.arange(1 << d.size)[:, None] >> np.arange(d.size)) & 1)
        return float((np.abs(signs @ d) >= observed).mean())
    draw, extreme, width = np.random.default_rng(0), 0, -(-d.size // 8)
    for start in range(0, FLIPS, BLOCK):
        rows = min(BLOCK, FLIPS - start)
        bits = np.frombuffer(draw.bytes(rows * width), np.uint8).reshape(rows, width)
        flipped = np.unpackbits(bits, axis=1, count=d.size).astype(np.float64)
        extreme += int((np.abs(d.sum() - 2 * (flipped @ d)) >= observed).sum())
    return (extreme + 1) / (FLIPS + 1)


def binomial_p(heads: int, throws: int) -> float:
    """The two-sided p of so many heads of a fair coin: twice the smaller tail, at most 1."""
    log_half, log_all = throws * math.log(2), math.lgamma(throws + 1)
    tail = sum(
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(throws - k + 1) - log_half)
        for k in range(min(heads, throws - heads) + 1)
    )
    return min(1.0, 2 * tail)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Each task's p adjusted for their number by Holm's step-down rule: at most `a` of them holds the chance of any
    false finding to `a`, however the tasks depend on each other.

    The k-th smallest of m is max over j ≤ k of (m − j + 1)·p₍ⱼ₎, at most 1.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: by task, in any order, which is kept.

    Raises:
        ValueError: one is not within [0, 1].
    """
    for task, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p={p} of {task!r} is not within [0, 1]")
    order = sorted(p_values, key=p_values.__getitem__)
    raised = accumulate((min(1.0, (len(order) - j) * p_values[task]) for j, task in enumerate(order)), max)
    adjusted = dict(zip(order, raised, strict=True))
    return {task: adjusted[task] for task in p_values}


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


@dataclass(frozen=True, slots=True)
class Strengths:
    """How strong each system is.

    Attributes:
        systems: names, the strongest first.
        strengths: log-odds against an average of these systems, which sum to 0; n counts the clusters that a system
            was judged in. A system that won or lost all has what the prior leaves, and a wide interval.
        verdicts: how many there are.
    """

    systems: tuple[str, ...]
    strengths: tuple[Interval, ...]
    verdicts: int

    def as_dict(self) -> dict[str, Any]:
        """Each system's strength by its name, the strongest first."""
        named = zip(self.systems, self.strengths, strict=True)
        return {"strengths": {name: one.as_dict() for name, one in named}, "verdicts": self.verdicts}


def bradley_terry(
    first: Sequence[str],
    second: Sequence[str],
    verdicts: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> Strengths:
    """Fit P(a beats b) = 1/(1 + e^−(θ_a − θ_b)), a tie being half a win for each, with intervals over clusters.

    Of each pair of systems a cluster counts once. A prior (`RIDGE`) draws strengths to 0, which makes them sum to 0.
    Intervals are θ ± t·se with the variance over clusters; `logistic.variance` widens it where few verdicts tell it. A
    single cluster has none.

    Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs".

    Args:
        first, second: names of the two systems of each verdict.
        verdicts: 1 for the first, 0 for the second, ½ for a tie, shape [n].
        clusters: the prompt of each verdict.

    Raises:
        InputError: parts of the systems were never compared with each other; it names the parts.
        ValueError: no verdicts, one that is outside [0, 1] or not finite, a system beside itself, or numbers of rows
            that differ.
    """
    (y,) = columns(verdicts=verdicts)
    within(0, 1, verdicts=y)
    if not len(first) == len(second) == y.size:
        raise ValueError(f"{len(first)} first and {len(second)} second systems for {y.size} verdicts")
    names = sorted({*first, *second})
    place = {name: k for k, name in enumerate(names)}
    a, b = (np.array([place[name] for name in side]) for side in (first, second))
    if (a == b).any():
        raise ValueError(f"{first[int(np.flatnonzero(a == b)[0])]!r} is compared with itself")
    _require_one_part(names, a, b)
    at, rows = places(clusters, y.size), np.arange(y.size)
    pair = np.minimum(a, b) * len(names) + np.maximum(a, b)  # of each pair a cluster counts once
    _, which, sizes = np.unique(at * len(names) ** 2 + pair, return_inverse=True, return_counts=True)
    x = np.zeros((y.size, len(names)))
    x[rows, a], x[rows, b] = 1.0, -1.0
    fit = fitted(x, y, 1 / sizes[which], at, np.full(len(names), RIDGE))
    centre = np.eye(len(names)) - 1 / len(names)  # strengths sum to 0, and vary only so far as that allows
    model, sandwich = (np.diag(centre @ covariance @ centre) for covariance in (fit.model, fit.sandwich))
    count = int(at.max()) + 1
    found = []
    for k, name in enumerate(names):
        theta, judged = float(fit.coefficients[k]), len(np.unique(at[(a == k) | (b == k)]))
        half = t_quantile(count - 1, level) * variance(sandwich[k], model[k]) ** 0.5 if count > 1 else None
        ends = (None, None) if half is None else (theta - half, theta + half)
        found.append((name, Interval(theta, *ends, judged)))
    found.sort(key=lambda one: -one[1].value)
    return Strengths(tuple(name for name, _ in found), tuple(one for _, one in found), y.size)


def _require_one_part(names: Sequence[str], a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
    """Raise InputError unless every system is compared with every other, if by way of others."""
    part = np.arange(len(names))
    for one, other in {*zip(a.tolist(), b.tolist(), strict=True)}:
        part[part == part[other]] = part[one]
    if len(found := np.unique(part)) > 1:
        parts = [", ".join(name for name, of in zip(names, part, strict=True) if of == one) for one in found]
        raise InputError(
            "systems",
            " | ".join(parts),
            "no verdict compares a system of one part with a system of another, so that their strengths have no common"
            " scale",
            "Compare at least one system of each part with one of the others, or rank each part by itself.",
        )


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two raters agree on the same pairs.

    Attributes:
        raw: the share of verdicts that are equal, ties among them.
        kappa: Cohen's, the agreement beyond chance; None where both always said the same one thing.
        verdicts: how many were compared.
    """

    raw: Interval
    kappa: Interval | None
    verdicts: int


@dataclass(frozen=True, slots=True)
class Swap:
    """What becomes of a judge's verdicts when the two answers change places.

    Attributes:
        consistency: the share of pairs with the same verdict in both orders. A judge that always says "A" has 0.
        shown_first: the share won by the answer that is shown first, a tie counted as half; ½ is no taste for place.
        win_rate: of the first system, verdicts that change with the order counted as ties.
    """

    consistency: Interval
    shown_first: Interval
    win_rate: Interval


@dataclass(frozen=True, slots=True)
class JudgeStatistics:
    """The statistics of a judge on known pairs.

    Attributes:
        agreement: with people or gold.
        swap: None where the judge saw one order.
        length_slope: the log-odds that length adds, of the judge; see `LengthControlled`. None without lengths.
        reference_slope: the same of people or gold on these pairs: longer answers may be better, and a judge's slope is
            a fault so far as it exceeds theirs.
        n: clusters behind the agreement.
    """

    agreement: Agreement
    swap: Swap | None
    length_slope: Interval | None
    reference_slope: Interval | None
    n: int


def measure_judge(
    judge: ArrayLike,
    reference: ArrayLike,
    swapped: ArrayLike | None = None,
    lengths: tuple[ArrayLike, ArrayLike] | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> JudgeStatistics:
    """Compare a judge with people or gold on the same pairs.

    Args:
        judge, reference: verdicts, 1 for the first system, ½ or 0, shape [n].
        swapped: the judge's verdicts with the second answer shown first; 1 is still for the first system. What is
            compared with the reference is then what survives the swap.
        lengths: of the first and of the second answers.
        clusters: the prompt, or what prompts share, of each pair.
        failed: True for a pair on which the judge gave no verdict in some order, shape [n]; in its place `judge` or
            `swapped` has ½. It agrees with no verdict and survives no swap; to the slope it is a tie.

    Raises:
        ValueError: no verdicts, numbers of rows that differ, or a value that is no verdict or not finite.
    """
    verdicts = judge if swapped is None else surviving(judge, swapped)
    agreed = agreement(verdicts, reference, clusters, level, failed)
    slope, reference_slope = (
        length_controlled(of, *lengths, clusters=clusters, level=level).slope if lengths else None
        for of in (verdicts, reference)
    )
    swaps = None if swapped is None else swap(judge, swapped, clusters, level, failed)
    return JudgeStatistics(agreed, swaps, slope, reference_slope, agreed.raw.n)


def agreement(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95,
    failed: ArrayLike | None = None,
) -> Agreement:  # fmt: skip
    """Raw agreement with Wilson's interval at the effective number of clusters, and Cohen's kappa with an interval of
    ln(1 − κ) by the jackknife over clusters (`align.ops.agreement.compute_coefficient_interval`).

    Raw agreement counts each cluster once, kappa each verdict. Where the two never differ, κ is 1, and its interval
    ends where it would be if as many verdicts differed as Wilson's interval of none leaves possible.

    Args:
        first, second: verdicts of two raters on the same pairs, each 0, ½ or 1, shape [n].
        failed: True where the first rater gave no verdict, which equals none of the second's, shape [n].

    Raises:
        ValueError: no verdicts, numbers of rows that differ, or a value other than 0, ½ and 1.
    """
    a, b = verdicts_of(first, second)
    at, none = places(clusters, a.size), failures(failed, a.size)
    same = proportion_interval(cluster_means(at, ((a == b) & ~none).astype(np.float64)), level=level)
    tables = np.zeros((int(at.max()) + 1, 4, 4))
    # The fourth value is "no verdict". The second rater never says it, so the two never share it, nor by chance.
    np.add.at(tables, (at, np.where(none, 3, 2 * a).astype(int), (2 * b).astype(int)), 1.0)
    whole = tables.sum(axis=0, keepdims=True)
    value = float(cohen_kappas(whole)[0])
    if np.isnan(value):
        return Agreement(same, None, a.size)
    if value >= 1:
        unlike = 1 - float(((whole[0].sum(axis=1) / a.size) ** 2).sum())
        low = 1 - wilson_interval(0.0, len(tables), normal_quantile(level))[1] / unlike
        return Agreement(same, Interval(1.0, low, 1.0, len(tables)), a.size)
    return Agreement(
        same,
        Interval(value, *compute_coefficient_interval(value, cohen_kappas(whole - tables), level), len(tables)),
        a.size,
    )


def swap(
    verdicts: ArrayLike, swapped: ArrayLike, clusters: Clusters | None = None, level: float = 0.95,
    failed: ArrayLike | None = None,
) -> Swap:  # fmt: skip
    """What the order of the answers does to a judge.

    Args:
        verdicts, swapped: with the first system's answer shown first, and shown second; 1 is for the first *system* in
            both, each 0, ½ or 1, shape [n].
        failed: True where there is no verdict in some order, so that no two are the same, shape [n].

    Raises:
        ValueError: as of `agreement`.
    """
    one, other = verdicts_of(verdicts, swapped)
    at, none = places(clusters, one.size), failures(failed, one.size)
    consistent = proportion_interval(cluster_means(at, ((one == other) & ~none).astype(np.float64)), level=level)
    return Swap(
        consistent,
        share_won((one + 1 - other) / 2, clusters, level),
        share_won(surviving(one, other), clusters, level),
    )


def failures(failed: ArrayLike | None, rows: int) -> NDArray[np.bool_]:
    """Raises: ValueError: another number of rows."""
    found = np.zeros(rows, dtype=bool) if failed is None else np.asarray(failed, dtype=bool)
    if found.shape != (rows,):
        raise ValueError(f"{found.size} failures for {rows} verdicts")
    return found


def verdicts_of(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as columns of 0, ½ and 1."""
    one, other = columns(verdicts=first, others=second)
    for column in (one, other):
        odd = np.flatnonzero(~np.isin(column, (0.0, 0.5, 1.0)))
        if odd.size:
            raise ValueError(f"{column[odd[0]]} in row {odd[0]} is no verdict: 0, 0.5 or 1 is expected")
    return one, other
