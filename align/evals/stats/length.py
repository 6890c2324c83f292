"""The win rate that a system would have if both answers were equally long, and a judge's taste for length.

A judge that loves length gives a system whose answers are longer a win rate above ½, be they better or not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.logistic import fitted, probability, variance
from align.evals.stats.observed import Clusters, cluster_means, columns, places, within
from align.ops.intervals import Interval, proportion, t_quantile, wilson

RIDGE = 0.1
"""On the slope, as a normal prior of standard deviation 3.2: it bounds the slope where length alone tells wins from
losses, and takes 0.2 % off it at 512 verdicts."""


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

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


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
    raw = proportion(cluster_means(at, y), level=level)
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
    low, high = wilson(p, 1 / (p * (1 - p) * of_theta), quantile)
    half = quantile * of_slope**0.5
    return Interval(p, low, high, clusters), Interval(slope, slope - half, slope + half, clusters)
