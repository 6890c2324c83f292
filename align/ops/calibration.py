"""Predicted probabilities beside what came of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.ops.intervals import grouped, proportion

SURE = 1e-9
"""The least probability that whoever says one is taken to mean."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions that fell between two edges, and what came of them.

    Attributes:
        predicted: mean predicted probability in the bin.
        observed: share that came true.
        low, high: the 95 % interval of that share.
        count: predictions in the bin.
    """

    predicted: float
    observed: float
    low: float
    high: float
    count: int


def calibration_bins(
    predicted: Sequence[float], outcomes: Sequence[float], groups: Sequence[str] | None = None, bins: int = 10
) -> list[Bin]:
    """Group predictions into equal widths of [0, 1]; empty bins are left out.

    Args:
        predicted: P(the first of the pair wins), in [0, 1].
        outcomes: 1 where it won, 0 where it lost, ½ for a tie. The order within a pair must be drawn without looking at
            the label: with the chosen answer always first every outcome is 1, and the plot says nothing.
        groups: those of one ranking share a name, for they depend on each other; without, none do.

    Raises:
        ValueError: lengths differ, or a value lies outside [0, 1].
    """
    if len(predicted) != len(outcomes):
        raise ValueError(f"{len(predicted)} predictions for {len(outcomes)} outcomes")
    members: list[list[tuple[float, float, str]]] = [[] for _ in range(bins)]
    for p, y, name in zip(predicted, outcomes, groups or map(str, range(len(outcomes))), strict=True):
        if not (0 <= p <= 1 and 0 <= y <= 1):
            raise ValueError(f"prediction {p} with outcome {y} is not within [0, 1]")
        members[min(int(p * bins), bins - 1)].append((p, y, name))  # p = 1 belongs to the last bin
    result = []
    for group in filter(None, members):
        ps, ys, names = zip(*group, strict=True)
        share = proportion(*grouped(names, ys))
        assert share.low is not None  # a share always has an interval
        assert share.high is not None
        result.append(Bin(sum(ps) / len(ps), share.value, share.low, share.high, len(group)))
    return result


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance of predicted probabilities from what came of them, Σ count · |predicted − observed| / Σ count.
    It is above 0 of a calibrated prediction too: each bin's share is drawn.

    Source: Naeini, Cooper and Hauskrecht 2015, "Obtaining well calibrated probabilities using Bayesian binning".

    Raises:
        ValueError: no bins.
    """
    if not bins:
        raise ValueError("no predictions")
    return sum(each.count * abs(each.predicted - each.observed) for each in bins) / sum(each.count for each in bins)


def log_odds(p: float) -> float:
    """ln p/(1−p) in nats, of a p that is taken to be no surer than `SURE`."""
    p = min(max(p, SURE), 1 - SURE)
    return math.log(p / (1 - p))


def brier_scores(log_odds: ArrayLike, outcomes: ArrayLike) -> NDArray[np.float64]:
    """(σ(log odds) − outcome)² of each prediction, shape [n]. A coin has ¼.

    Source: Brier 1950, "Verification of forecasts expressed in terms of probability".

    Args:
        log_odds: of the first of each pair, in nats.
        outcomes: 1 where it won, 0 where it lost.
    """
    odds, came = _both(log_odds, outcomes)
    return (np.exp(-np.logaddexp(0, -odds)) - came) ** 2


def log_losses(log_odds: ArrayLike, outcomes: ArrayLike) -> NDArray[np.float64]:
    """−ln of the probability that each prediction gave to what came of it, in nats, shape [n]. A coin has ln 2. The
    arguments are those of `brier_scores`."""
    odds, came = _both(log_odds, outcomes)
    return np.logaddexp(0, -odds) * came + np.logaddexp(0, odds) * (1 - came)


def _both(log_odds: ArrayLike, outcomes: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    odds, came = (np.asarray(values, dtype=np.float64) for values in (log_odds, outcomes))
    if odds.shape != came.shape or odds.ndim != 1:
        raise ValueError(f"{odds.shape} predictions for {came.shape} outcomes")
    return odds, came
