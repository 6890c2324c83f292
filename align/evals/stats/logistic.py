"""Logistic regression on verdicts, with the covariance of its coefficients over clusters. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.ops.intervals import PRIOR

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
    `align.ops.intervals.proportion`, so that unanimous verdicts still have an interval."""
    dispersion = (sandwich / model / model + PRIOR) / (1 / model + PRIOR)
    return float(model * dispersion)
