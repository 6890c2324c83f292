"""The win rate between answers of equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.columns import Clusters, average_clusters, number_clusters, require_within, to_columns
from align.evals.stats.logistic import RIDGE, compute_sigmoid, fit_logistic, shrink_variance
from align.ops.intervals import Interval, proportion_interval, t_quantile, wilson_interval


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
