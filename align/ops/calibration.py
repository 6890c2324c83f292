"""Calibration of predicted probabilities against observed outcomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.ops.intervals import average_by_group, proportion_interval

SURE = 1e-9
"""Smallest probability whose log odds are computed. The largest is 1 less this."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """The mean prediction and the mean outcome of the predictions in one interval of probabilities.

    Attributes:
        predicted: mean predicted probability in the bin.
        observed: mean outcome, a share.
        low, high: the 95 % interval of that share.
        count: number of predictions in the bin.
    """

    predicted: float
    observed: float
    low: float
    high: float
    count: int


def bin_predictions(
    predicted: Sequence[float], outcomes: Sequence[float], groups: Sequence[str] | None = None, bin_count: int = 10
) -> list[CalibrationBin]:
    """Group predictions into bins of equal width over [0, 1], and return each bin's mean prediction and share of wins;
    empty bins are left out.

    Args:
        predicted: P(the first of the pair wins), in [0, 1].
        outcomes: 1 if it won, 0 if it lost, ½ for a tie. The order within a pair must not depend on the label: with the
            chosen answer always first, every outcome is 1.
        groups: the ranking of each prediction, because predictions of one ranking depend on each other; without it all
            are independent.

    Raises:
        ValueError: lengths differ, or a value lies outside [0, 1].
    """
    if len(predicted) != len(outcomes):
        raise ValueError(f"{len(predicted)} predictions for {len(outcomes)} outcomes")
    members: list[list[tuple[float, float, str]]] = [[] for _ in range(bin_count)]
    for p, y, name in zip(predicted, outcomes, groups or map(str, range(len(outcomes))), strict=True):
        if not (0 <= p <= 1 and 0 <= y <= 1):
            raise ValueError(f"prediction {p} with outcome {y} is not within [0, 1]")
        members[min(int(p * bin_count), bin_count - 1)].append((p, y, name))  # p = 1 belongs to the last bin
    result = []
    for group in filter(None, members):
        ps, ys, names = zip(*group, strict=True)
        share = proportion_interval(*average_by_group(names, ys))
        assert share.low is not None  # a share always has an interval
        assert share.high is not None
        result.append(CalibrationBin(sum(ps) / len(ps), share.value, share.low, share.high, len(group)))
    return result


def compute_calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Return the expected calibration error (ECE), Σ count · |predicted − observed| / Σ count. It is above 0 for
    calibrated predictions too, because each bin's share is a sample.

    Source: Naeini, Cooper and Hauskrecht 2015, "Obtaining well calibrated probabilities using Bayesian binning".

    Raises:
        ValueError: no bins.
    """
    if not bins:
        raise ValueError("no predictions")
    return sum(bin.count * abs(bin.predicted - bin.observed) for bin in bins) / sum(bin.count for bin in bins)


def compute_log_odds(p: float) -> float:
    """Return ln p/(1−p) in nats, after clipping p to [`SURE`, 1 − `SURE`]."""
    p = min(max(p, SURE), 1 - SURE)
    return math.log(p / (1 - p))


def compute_brier_scores(log_odds: ArrayLike, outcomes: ArrayLike) -> NDArray[np.float64]:
    """Return the Brier score (σ(log odds) − outcome)² of each prediction, shape [n]. A constant prediction of ½ has ¼.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability".

    Args:
        log_odds: of the first answer of each pair, in nats.
        outcomes: 1 if it won, 0 if it lost.
    """
    odds, results = _to_arrays(log_odds, outcomes)
    return (np.exp(-np.logaddexp(0, -odds)) - results) ** 2


def compute_log_losses(log_odds: ArrayLike, outcomes: ArrayLike) -> NDArray[np.float64]:
    """Return the log loss of each prediction, −ln of the probability predicted for its outcome, in nats, shape [n]. A
    constant prediction of ½ has ln 2. The arguments are those of `compute_brier_scores`."""
    odds, results = _to_arrays(log_odds, outcomes)
    return np.logaddexp(0, -odds) * results + np.logaddexp(0, odds) * (1 - results)


def _to_arrays(log_odds: ArrayLike, outcomes: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    odds = np.asarray(log_odds, dtype=np.float64)
    results = np.asarray(outcomes, dtype=np.float64)
    if odds.shape != results.shape or odds.ndim != 1:
        raise ValueError(f"{odds.shape} predictions for {results.shape} outcomes")
    return odds, results
