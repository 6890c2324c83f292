"""Statistics of evaluations: pure functions over columns of numbers, with NumPy alone.

    result = compare_shares(right_new, right_old, clusters=prompt_ids)
    result.difference                      # Interval(value, low, high, n)
    decide(DecisionRule("not_worse", margin=0.05, least_n=200), result.difference).outcome

Every figure is an `align.ops.intervals.Interval`, whose n counts clusters, the units that were sampled independently.
`benchmarks/evals/coverage.py` measures how often the intervals cover and how often the gates err.
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
"""One cluster id per row. Rows with the same id, such as answers to one prompt, depend on each other."""


def to_columns(**values_by_name: ArrayLike) -> list[NDArray[np.float64]]:
    """Return the given columns of numbers as float64 arrays of one common shape [n], n ≥ 1, in the order of the
    arguments. Raises ValueError otherwise.

    Raises:
        ValueError: a column is empty, is not a list of numbers, holds NaN or an infinite number, or has another length
            than the first. The message names the column.
    """
    columns_by_name = {name: np.asarray(values, dtype=np.float64) for name, values in values_by_name.items()}
    first = next(iter(columns_by_name))
    size = columns_by_name[first].size
    for name, column in columns_by_name.items():
        if column.ndim != 1 or column.size == 0:
            raise ValueError(f"{name} has shape {column.shape}: one number a row is expected, and at least one row")
        if column.size != size:
            raise ValueError(f"{name} has {column.size} rows and {first} has {size}: they must be the same")
        if not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column))[0])
            raise ValueError(f"{name} is {column[row]} in row {row}: a finite number is expected")
    return list(columns_by_name.values())


def require_within(low: float, high: float, **columns_by_name: NDArray[np.float64]) -> None:
    """Raise ValueError if a column has a number outside [low, high]. The message names the column, the row and the
    number."""
    for name, column in columns_by_name.items():
        outside = np.flatnonzero((column < low) | (column > high))
        if outside.size:
            raise ValueError(f"{name} is {column[outside[0]]} in row {outside[0]}, which is outside {low} to {high}")


def number_clusters(clusters: Clusters | None, rows: int) -> NDArray[np.int64]:
    """Return the index of each row's cluster, 0 … C−1 in order of first appearance; shape [rows]. If `clusters` is
    None, each row is a cluster.

    Raises:
        ValueError: the number of ids differs from the number of rows.
    """
    if clusters is None:
        return np.arange(rows)
    if len(clusters) != rows:
        raise ValueError(f"{len(clusters)} cluster ids for {rows} rows: one a row is expected")
    number_of_id = {id: i for i, id in enumerate(dict.fromkeys(clusters))}
    return np.array([number_of_id[id] for id in clusters], dtype=np.int64)


def average_clusters(cluster_numbers: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each cluster's values, shape [C]. `cluster_numbers` holds the cluster's index of each
    value."""
    return np.bincount(cluster_numbers, weights=values) / np.bincount(cluster_numbers)


def compute_wins(score_policy: ArrayLike, score_ref: ArrayLike) -> NDArray[np.float64]:
    """Return, per prompt, 1 if the policy's answer scored higher than the reference's, 0 if lower, ½ if equal; shape
    [n]. Raises ValueError if a score is NaN.

    The mean is the win rate with ties counted as half: a policy compared with itself has exactly ½.
    """
    policy = np.asarray(score_policy, dtype=np.float64)
    ref = np.asarray(score_ref, dtype=np.float64)
    if policy.shape != ref.shape:
        raise ValueError(f"shapes {policy.shape} and {ref.shape} differ: one number a prompt is expected from each")
    if np.isnan(policy).any() or np.isnan(ref).any():
        raise ValueError("a score is NaN, so it can neither win nor lose")
    return np.where(policy > ref, 1.0, np.where(policy < ref, 0.0, 0.5))


def compute_win_rate(verdicts: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Interval:
    """Return the win rate of the first model, a tie counted as half, with Wilson's interval at the effective number of
    clusters. See `align.ops.intervals.proportion_interval`.

    Args:
        verdicts: 1, ½, 0, or means of such, shape [n].
        clusters: the prompt, or what prompts share, of each verdict. Each cluster counts once.

    Raises:
        ValueError: there are no verdicts, one is outside [0, 1] or not finite, or the number of ids differs.
    """
    (wins,) = to_columns(verdicts=verdicts)
    require_within(0, 1, verdicts=wins)
    return proportion_interval(average_clusters(number_clusters(clusters, wins.size), wins), level=level)


def estimate_pass_at_k(right: int, answers: int, k: int) -> float:
    """Estimate the probability that at least one of k answers to a prompt is right, without bias: 1 − C(n−c, k)/C(n, k)
    for c right ones among n answers.

    Source: Chen et al. 2021, "Evaluating large language models trained on code".

    Args:
        k: from 1 to `answers`.
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def merge_swapped_verdicts(verdicts: ArrayLike, swapped: ArrayLike) -> NDArray[np.float64]:
    """Merge the verdicts on each pair in both orders: equal verdicts are kept, and different ones become a tie (½);
    shape [n].

    Args:
        verdicts, swapped: on the same pairs, with the answers shown in either order. In both, 1 is for the first
            *system*.

    Raises:
        ValueError: a verdict is outside [0, 1] or not finite, or the lengths differ.
    """
    in_order, in_swapped_order = to_columns(verdicts=verdicts, swapped=swapped)
    require_within(0, 1, verdicts=in_order, swapped=in_swapped_order)
    return np.where(in_order == in_swapped_order, in_order, 0.5)


MAX_STEPS = 100
STEP_TOLERANCE = 1e-9
"""Largest component of a Newton step below which the fit ends. Convergence is quadratic."""


class LogisticFit(NamedTuple):
    """Coefficients of a logistic regression and their covariance.

    Attributes:
        coefficients: log-odds, shape [k].
        model: their covariance if rows were independent and the model held, H⁻¹, shape [k, k].
        sandwich: their covariance over clusters, H⁻¹ M H⁻¹, shape [k, k]. nan for a single cluster.
    """

    coefficients: NDArray[np.float64]
    model: NDArray[np.float64]
    sandwich: NDArray[np.float64]


def fit_logistic(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: NDArray[np.float64],
    cluster_numbers: NDArray[np.int64],
    ridge: NDArray[np.float64],
) -> LogisticFit:
    """Fit a weighted logistic regression with a ridge penalty by Newton's method, and return the coefficients with
    their covariances. It maximises Σ w·(y ln p + (1−y) ln(1−p)) − Σ ridge·β²/2 with p = 1/(1 + e^(−xβ)).

    The covariance over clusters is Liang and Zeger's (1986, "Longitudinal data analysis using generalized linear
    models"): M = C/(C−1) Σ s sᵀ over the score s of each of C clusters. It needs no model of the dependence between the
    rows of a cluster, nor of the ties at ½, which vary less than single trials do.

    Args:
        x: shape [n, k].
        y: verdicts within [0, 1], shape [n].
        weights: of rows, shape [n].
        cluster_numbers: of each row, from 0, shape [n].
        ridge: of coefficients, shape [k]. It has to be above 0 if the data alone may leave a coefficient unbounded.
    """
    beta = np.zeros(x.shape[1])
    objective = compute_penalized_log_likelihood(x, y, weights, ridge, beta)
    for _ in range(MAX_STEPS):
        probabilities = compute_sigmoid(x @ beta)
        gradient = x.T @ (weights * (y - probabilities)) - ridge * beta
        step = np.linalg.solve(compute_information(x, weights, ridge, probabilities), gradient)
        if np.abs(step).max() < STEP_TOLERANCE:
            break
        while (
            compute_penalized_log_likelihood(x, y, weights, ridge, beta + step) < objective
            and np.abs(step).max() > STEP_TOLERANCE
        ):
            step = step / 2  # far from the maximum a whole step may pass it
        beta = beta + step
        objective = compute_penalized_log_likelihood(x, y, weights, ridge, beta)
    probabilities = compute_sigmoid(x @ beta)
    model = np.linalg.inv(compute_information(x, weights, ridge, probabilities)).astype(np.float64)
    scores = np.zeros((int(cluster_numbers.max()) + 1, x.shape[1]))
    np.add.at(scores, cluster_numbers, x * (weights * (y - probabilities))[:, None])
    clusters = len(scores)
    score_covariance = scores.T @ scores * (clusters / (clusters - 1) if clusters > 1 else np.nan)
    return LogisticFit(beta, model, model @ score_covariance @ model)


def compute_sigmoid(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1/(1 + e^(−x)) without overflow."""
    return np.exp(-np.logaddexp(0, -log_odds))


def compute_penalized_log_likelihood(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    weights: NDArray[np.float64],
    ridge: NDArray[np.float64],
    beta: NDArray[np.float64],
) -> float:
    log_odds = x @ beta
    return float(weights @ (y * log_odds - np.logaddexp(0, log_odds)) - ridge @ beta**2 / 2)


def compute_information(
    x: NDArray[np.float64], weights: NDArray[np.float64], ridge: NDArray[np.float64], p: NDArray[np.float64]
) -> NDArray[np.float64]:
    return x.T @ (x * (weights * p * (1 - p))[:, None]) + np.diag(ridge)


def shrink_variance(sandwich_variance: float, model_variance: float) -> float:
    """Return the cluster-robust variance of a log-odds, shrunk towards the variance under the model. The ratio of the
    two is shrunk towards 1 by `PRIOR`, as in `align.ops.intervals.proportion_interval`, so that unanimous verdicts
    still have an interval."""
    dispersion = (sandwich_variance / model_variance / model_variance + PRIOR) / (1 / model_variance + PRIOR)
    return float(model_variance * dispersion)


RIDGE = 0.1
"""Ridge penalty on the length slope and on Bradley-Terry strengths, equal to a normal prior with a standard deviation
of 3.2 log-odds. It bounds the slope if length alone tells wins from losses, and shrinks it by 0.2 % at 512 verdicts. It
also bounds the strength of a model that wins or loses every comparison."""


@dataclass(frozen=True, slots=True)
class LengthControlledWinRate:
    """A win rate before and after controlling for the lengths of the answers.

    Attributes:
        raw: the win rate, ties counted as half.
        controlled: the win rate at equal lengths.
        slope: the log-odds added by one standard deviation of the log ratio of lengths. It is 0 for a judge without a
            length bias, and above 0 if longer answers win more often. It has no interval if the effect of length cannot
            be separated from quality.
    """

    raw: Interval
    controlled: Interval
    slope: Interval


def control_for_length(
    verdicts: ArrayLike,
    first_lengths: ArrayLike,
    second_lengths: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> LengthControlledWinRate:
    """Estimate the win rate between answers of equal length, by a logistic regression of the verdicts on the ratio of
    lengths. The regressor is x = arctan(r/s), r = ln((1 + first)/(1 + second)), with s the standard deviation of r. The
    controlled win rate is 1/(1 + e^−θ) for P(first wins) = 1/(1 + e^−(θ + φ·x)).

    The variance of θ is that over clusters. An effective number of verdicts follows from it, and Wilson's interval from
    that. If all verdicts are equal, or the ratio of lengths is the same number other than 1 everywhere, the effect of
    length cannot be separated from quality: in the first case the interval is that of the raw win rate, in the second
    it is [0, 1].

    Source: Dubois, Galambosi, Liang and Hashimoto 2024, "Length-Controlled AlpacaEval". They use x = tanh(d/s) of the
    difference d. Over judges with six kinds of length bias the arctangent of the ratio has a smaller error
    (docs/decisions.md), and its slope is in log-odds per standard deviation if lengths are nearly equal. The difficulty
    of each prompt, which they estimate from other systems, is left out.

    Args:
        verdicts: 1, ½ or 0, shape [n]; 1 is for the first.
        first_lengths, second_lengths: of the two answers, in tokens or characters, at least 0, shape [n] each.
        clusters: the prompt, or what prompts share, of each verdict. Each cluster counts once.

    Raises:
        ValueError: there are no rows, the numbers of rows differ, a verdict is outside [0, 1], a length is below 0, or
            a value is not finite.
    """
    y, first, second = to_columns(verdicts=verdicts, first_lengths=first_lengths, second_lengths=second_lengths)
    require_within(0, 1, verdicts=y)
    require_within(0, np.inf, first_lengths=first, second_lengths=second)
    cluster_numbers = number_clusters(clusters, y.size)
    raw = proportion_interval(average_clusters(cluster_numbers, y), level=level)
    ratio = np.log1p(first) - np.log1p(second)
    spread = float(ratio.std())
    if np.ptp(y) == 0 or not ratio.any():
        return LengthControlledWinRate(raw, raw, Interval(0.0, None, None, raw.n))
    if spread < 1e-9 * float(np.abs(ratio).max()):
        return LengthControlledWinRate(raw, Interval(raw.value, 0.0, 1.0, raw.n), Interval(0.0, None, None, raw.n))
    fit = fit_length_model(y, np.arctan(ratio / spread), cluster_numbers, level)
    return LengthControlledWinRate(raw, fit.win_rate_at_equal_length, fit.slope)


class LengthFit(NamedTuple):
    """A logistic regression of verdicts on the lengths of both answers.

    Attributes:
        win_rate_at_equal_length: the first system's win rate between answers of equal length.
        slope: the coefficient of the length, in log-odds; positive if the longer answer wins more often.
    """

    win_rate_at_equal_length: Interval
    slope: Interval


def fit_length_model(
    y: NDArray[np.float64], x: NDArray[np.float64], cluster_numbers: NDArray[np.int64], level: float
) -> LengthFit:
    """Fit a logistic regression of the verdicts `y` on the length feature `x`, which is 0 for answers of equal length.
    Returns the win rate at x = 0 and the slope.

    Args:
        y: 1 for a win of the first system, ½ for a tie, 0 for a loss; shape [n].
        x: positive if the first system's answer is longer; shape [n].
        cluster_numbers: see `number_clusters`.
    """
    weights = 1 / np.bincount(cluster_numbers)[cluster_numbers]
    fit = fit_logistic(np.column_stack([np.ones(y.size), x]), y, weights, cluster_numbers, np.array([0.0, RIDGE]))
    clusters = int(cluster_numbers.max()) + 1
    slope = float(fit.coefficients[1])
    win_share = float(compute_sigmoid(fit.coefficients[:1])[0])
    if clusters < 3:  # two coefficients leave no degree of freedom
        return LengthFit(Interval(win_share, 0.0, 1.0, clusters), Interval(slope, None, None, clusters))
    quantile = t_quantile(clusters - 2, level)
    theta_variance = shrink_variance(fit.sandwich[0, 0], fit.model[0, 0])
    slope_variance = shrink_variance(fit.sandwich[1, 1], fit.model[1, 1])
    low, high = wilson_interval(win_share, 1 / (win_share * (1 - win_share) * theta_variance), quantile)
    half_width = quantile * slope_variance**0.5
    return LengthFit(
        Interval(win_share, low, high, clusters), Interval(slope, slope - half_width, slope + half_width, clusters)
    )


POWER = 0.8
"""Probability with which a sample size detects a true difference."""
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
    width = normal_quantile(level) * math.sqrt(bound * (1 - bound)) + _NORMAL_POWER * math.sqrt(p * (1 - p))
    n = math.ceil(dispersion * (width / (p - bound)) ** 2)
    return max(1, n) if n <= MAX_CLUSTERS else None


_NORMAL_POWER = NormalDist().inv_cdf(POWER)


MAX_ENUMERATED = 13
"""Maximum number n of differences for which the test enumerates all 2ⁿ sign flips. For more, it samples flips."""
SAMPLED_FLIPS = 9_999
"""Number of sampled sign flips. With the observed signs included, the smallest p is 1/10,000."""
DIFFERENCE_PRIOR = PRIOR / 2
"""Strength of the shrinkage of a difference's dispersion towards 1, as a variance summed over clusters."""
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
        first_means - second_means,
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
    return _build_comparison(
        mean_interval(first_means, level),
        mean_interval(second_means, level),
        mean_interval(first_means - second_means, level),
        first_means - second_means,
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
    power_factor = ((z + normal_quantile(2 * POWER - 1)) / z) ** 2 if outcomes.wins or outcomes.losses else 1.0

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
    interval has no ends if all differences are equal, since then nothing bounds the next one."""
    first_means, second_means = _compute_cluster_means(first, second, clusters, are_shares=False)
    return mean_interval(first_means - second_means, level)


def _compute_cluster_means(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None, are_shares: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each cluster's mean outcome of the first and of the second model, shape [C] each."""
    first_column, second_column = to_columns(first=first, second=second)
    if are_shares:
        require_within(0, 1, first=first_column, second=second_column)
    cluster_numbers = number_clusters(clusters, first_column.size)
    return average_clusters(cluster_numbers, first_column), average_clusters(cluster_numbers, second_column)


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
        level: of the interval that decides. With 0.95, a system passes wrongly in 2.5 % of cases.
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


class Look(NamedTuple):
    """An evaluation of data that grow from one evaluation to the next.

    Attributes:
        n: number of clusters.
        outcome: by the interval of that evaluation alone.
        data: digest of the compared values.
    """

    n: int
    outcome: Outcome
    data: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome of a decision rule on a figure.

    Attributes:
        outcome: `undecided` does not count as a pass.
        figure: the figure that was decided on.
        bound: see `Rule.bound`.
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


@dataclass(frozen=True, slots=True)
class Strengths:
    """Bradley-Terry strengths of several models, with intervals.

    Attributes:
        systems: names, the strongest first.
        strengths: log-odds against an average of these systems, which sum to 0; n counts the clusters in which a system
            was judged. A system that won or lost every comparison has a strength bounded by the prior, and a wide
            interval.
        verdicts: number of verdicts.
    """

    systems: tuple[str, ...]
    strengths: tuple[Interval, ...]
    verdicts: int

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object `strengths`, model name → interval with the strongest first, and `verdicts`, the
        number of verdicts."""
        pairs = zip(self.systems, self.strengths, strict=True)
        return {"strengths": {name: strength.as_dict() for name, strength in pairs}, "verdicts": self.verdicts}


def fit_bradley_terry(
    first: Sequence[str],
    second: Sequence[str],
    verdicts: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> Strengths:
    """Fit the Bradley-Terry strength of each model to pairwise verdicts, with intervals over clusters. P(a beats b) =
    1/(1 + e^−(θ_a − θ_b)), and a tie is half a win for each.

    For each pair of systems a cluster counts once. A prior (`RIDGE`) shrinks strengths towards 0, so that they sum to
    0. Intervals are θ ± t·se with the variance over clusters, which `shrink_variance` widens if there are few
    verdicts. With a single cluster there is no interval.

    Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs".

    Args:
        first, second: names of the two systems of each verdict.
        verdicts: 1 for the first, 0 for the second, ½ for a tie, shape [n].
        clusters: the prompt of each verdict.

    Raises:
        InputError: some systems are connected by no chain of comparisons. The message names the groups.
        ValueError: there are no verdicts, one is outside [0, 1] or not finite, a system is compared with itself, or the
            numbers of rows differ.
    """
    (y,) = to_columns(verdicts=verdicts)
    require_within(0, 1, verdicts=y)
    if not len(first) == len(second) == y.size:
        raise ValueError(f"{len(first)} first and {len(second)} second systems for {y.size} verdicts")
    names = sorted({*first, *second})
    number_of_name = {name: k for k, name in enumerate(names)}
    first_numbers, second_numbers = (np.array([number_of_name[name] for name in side]) for side in (first, second))
    if (first_numbers == second_numbers).any():
        raise ValueError(f"{first[int(np.flatnonzero(first_numbers == second_numbers)[0])]!r} is compared with itself")
    _require_connected(names, first_numbers, second_numbers)
    cluster_numbers = number_clusters(clusters, y.size)
    rows = np.arange(y.size)
    low_numbers = np.minimum(first_numbers, second_numbers)
    high_numbers = np.maximum(first_numbers, second_numbers)
    pair = low_numbers * len(names) + high_numbers  # a cluster counts once for each unordered pair
    _, pair_numbers, sizes = np.unique(
        cluster_numbers * len(names) ** 2 + pair, return_inverse=True, return_counts=True
    )
    x = np.zeros((y.size, len(names)))
    x[rows, first_numbers] = 1.0
    x[rows, second_numbers] = -1.0
    fit = fit_logistic(x, y, 1 / sizes[pair_numbers], cluster_numbers, np.full(len(names), RIDGE))
    centre = np.eye(len(names)) - 1 / len(names)  # strengths sum to 0, and vary only so far as that allows
    model, sandwich = (np.diag(centre @ covariance @ centre) for covariance in (fit.model, fit.sandwich))
    cluster_total = int(cluster_numbers.max()) + 1
    strengths = []
    for k, name in enumerate(names):
        theta = float(fit.coefficients[k])
        cluster_count = len(np.unique(cluster_numbers[(first_numbers == k) | (second_numbers == k)]))
        half_width = (
            t_quantile(cluster_total - 1, level) * shrink_variance(sandwich[k], model[k]) ** 0.5
            if cluster_total > 1
            else None
        )
        ends = (None, None) if half_width is None else (theta - half_width, theta + half_width)
        strengths.append((name, Interval(theta, *ends, cluster_count)))
    strengths.sort(key=lambda entry: -entry[1].value)
    return Strengths(tuple(name for name, _ in strengths), tuple(strength for _, strength in strengths), y.size)


def _require_connected(names: Sequence[str], first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
    """Raise InputError unless a chain of comparisons connects every model to every other."""
    group_of = np.arange(len(names))
    for i, j in {*zip(first.tolist(), second.tolist(), strict=True)}:
        group_of[group_of == group_of[j]] = group_of[i]
    groups = np.unique(group_of)
    if len(groups) > 1:
        members = [
            ", ".join(name for name, own_group in zip(names, group_of, strict=True) if own_group == group)
            for group in groups
        ]
        raise InputError(
            "systems",
            " | ".join(members),
            "no verdict compares a system of one part with a system of another, so that their strengths have no common"
            " scale",
            "Compare at least one system of each part with one of the others, or rank each part by itself.",
        )


@dataclass(frozen=True, slots=True)
class RaterAgreement:
    """The agreement of two raters on the same pairs.

    Attributes:
        raw: the share of equal verdicts, equal ties included.
        kappa: Cohen's kappa, the agreement beyond chance. None if both raters always gave one and the same verdict.
        verdicts: number of compared verdicts.
    """

    raw: Interval
    kappa: Interval | None
    verdicts: int


@dataclass(frozen=True, slots=True)
class SwapEffect:
    """The effect of swapping the two shown answers on a judge's verdicts.

    Attributes:
        consistency: the share of pairs with the same verdict in both orders. A judge that always prefers "A" has 0.
        shown_first: the share won by the answer that is shown first, a tie counted as half. Without a position bias it
            is ½.
        win_rate: of the first system, with verdicts that change with the order counted as ties.
    """

    consistency: Interval
    shown_first: Interval
    win_rate: Interval


@dataclass(frozen=True, slots=True)
class JudgeStatistics:
    """A judge's agreement, order effect and length bias, on pairs with known verdicts.

    Attributes:
        agreement: with the reference, which is people or gold.
        swap: None if the judge saw one order only.
        length_slope: the log-odds that length adds to the judge's verdicts, see `LengthControlledWinRate`. None without
            lengths.
        reference_slope: the same for the reference on these pairs. Longer answers may be better, so only the excess of
            the judge's slope over this one is a bias.
        n: number of clusters behind the agreement.
    """

    agreement: RaterAgreement
    swap: SwapEffect | None
    length_slope: Interval | None
    reference_slope: Interval | None
    n: int


def compute_judge_statistics(
    judge: ArrayLike,
    reference: ArrayLike,
    swapped: ArrayLike | None = None,
    lengths: tuple[ArrayLike, ArrayLike] | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> JudgeStatistics:
    """Compute a judge's agreement with reference verdicts on the same pairs, the effect of the answers' order, and the
    length bias of both.

    Args:
        judge, reference: verdicts, 1 for the first system, ½ or 0, shape [n].
        swapped: the judge's verdicts with the second answer shown first; 1 is still for the first system. If given,
            only verdicts that are the same in both orders are compared with the reference, others count as ties.
        lengths: of the first and of the second answers.
        clusters: the prompt, or what prompts share, of each pair.
        failed: True for a pair on which the judge gave no verdict in some order, shape [n]. `judge` or `swapped` then
            has ½ for it. It agrees with no verdict and is not consistent; for the slope it is a tie.

    Raises:
        ValueError: there are no verdicts, the numbers of rows differ, or a value is not a verdict.
    """
    verdicts = judge if swapped is None else merge_swapped_verdicts(judge, swapped)
    judge_agreement = compute_agreement(verdicts, reference, clusters, level, failed)
    length_slope, reference_slope = (
        control_for_length(column, *lengths, clusters=clusters, level=level).slope if lengths else None
        for column in (verdicts, reference)
    )
    swap_effect = None if swapped is None else measure_swap_effect(judge, swapped, clusters, level, failed)
    return JudgeStatistics(judge_agreement, swap_effect, length_slope, reference_slope, judge_agreement.raw.n)


def compute_agreement(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> RaterAgreement:
    """Compute the share of equal verdicts of two raters and Cohen's kappa, each with an interval over clusters. The
    share has Wilson's interval at the effective number of clusters; kappa has an interval of ln(1 − κ) by the jackknife
    over clusters (`align.ops.agreement.compute_coefficient_interval`).

    Raw agreement counts each cluster once, kappa each verdict. If the two never differ, κ is 1, and the lower end of
    its interval is the κ that results if as many verdicts differ as Wilson's interval of no difference allows.

    Args:
        first, second: verdicts of two raters on the same pairs, each 0, ½ or 1, shape [n].
        failed: True for a row without a verdict of the first rater, which equals no verdict of the second; shape [n].

    Raises:
        ValueError: there are no verdicts, the numbers of rows differ, or a value is not 0, ½ or 1.
    """
    first_verdicts, second_verdicts = validate_verdicts(first, second)
    cluster_numbers = number_clusters(clusters, first_verdicts.size)
    is_missing = flag_failures(failed, first_verdicts.size)
    raw = proportion_interval(
        average_clusters(cluster_numbers, ((first_verdicts == second_verdicts) & ~is_missing).astype(np.float64)),
        level=level,
    )
    tables = np.zeros((int(cluster_numbers.max()) + 1, 4, 4))
    # The fourth value is "no verdict". The second rater never has it, so the expected agreement on it is 0.
    np.add.at(
        tables,
        (cluster_numbers, np.where(is_missing, 3, 2 * first_verdicts).astype(int), (2 * second_verdicts).astype(int)),
        1.0,
    )
    table = tables.sum(axis=0, keepdims=True)
    value = float(cohen_kappas(table)[0])
    if np.isnan(value):
        return RaterAgreement(raw, None, first_verdicts.size)
    if value >= 1:
        unlike = 1 - float(((table[0].sum(axis=1) / first_verdicts.size) ** 2).sum())
        low = 1 - wilson_interval(0.0, len(tables), normal_quantile(level))[1] / unlike
        return RaterAgreement(raw, Interval(1.0, low, 1.0, len(tables)), first_verdicts.size)
    return RaterAgreement(
        raw,
        Interval(value, *compute_coefficient_interval(value, cohen_kappas(table - tables), level), len(tables)),
        first_verdicts.size,
    )


def measure_swap_effect(
    verdicts: ArrayLike,
    swapped: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> SwapEffect:
    """Measure the effect of the order of the answers on a judge's verdicts: consistency, share won by the answer shown
    first, and merged win rate.

    Args:
        verdicts, swapped: with the first system's answer shown first, and shown second. In both, 1 is for the first
            *system*. Each is 0, ½ or 1, shape [n].
        failed: True for a pair without a verdict in some order, which is not consistent; shape [n].

    Raises:
        ValueError: as in `compute_agreement`.
    """
    in_order, in_swapped_order = validate_verdicts(verdicts, swapped)
    cluster_numbers = number_clusters(clusters, in_order.size)
    is_missing = flag_failures(failed, in_order.size)
    consistent = proportion_interval(
        average_clusters(cluster_numbers, ((in_order == in_swapped_order) & ~is_missing).astype(np.float64)),
        level=level,
    )
    return SwapEffect(
        consistent,
        compute_win_rate((in_order + 1 - in_swapped_order) / 2, clusters, level),
        compute_win_rate(merge_swapped_verdicts(in_order, in_swapped_order), clusters, level),
    )


def flag_failures(failed: ArrayLike | None, rows: int) -> NDArray[np.bool_]:
    """Return `failed` as a boolean array of shape [rows], all False without it. Raises ValueError if it has another
    number of rows."""
    flags = np.zeros(rows, dtype=bool) if failed is None else np.asarray(failed, dtype=bool)
    if flags.shape != (rows,):
        raise ValueError(f"{flags.size} failures for {rows} verdicts")
    return flags


def validate_verdicts(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two columns of verdicts as float64 arrays of shape [n]. Raises ValueError if a verdict is not 0, ½ or 1,
    or the lengths differ."""
    first_column, second_column = to_columns(verdicts=first, others=second)
    for column in (first_column, second_column):
        invalid_rows = np.flatnonzero(~np.isin(column, (0.0, 0.5, 1.0)))
        if invalid_rows.size:
            raise ValueError(
                f"{column[invalid_rows[0]]} in row {invalid_rows[0]} is no verdict: 0, 0.5 or 1 is expected"
            )
    return first_column, second_column
