"""Logistic regression with a ridge penalty, and the variance of its coefficients over clusters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.ops.intervals import PRIOR

MAX_STEPS = 100
STEP_TOLERANCE = 1e-9
"""Largest component of a Newton step below which the fit ends. Convergence is quadratic."""


RIDGE = 0.1
"""Ridge penalty on the length slope and on Bradley-Terry strengths, equal to a normal prior with a standard deviation
of 3.2 log-odds. It bounds the slope if length alone tells wins from losses, and shrinks it by 0.2 % at 512 verdicts. It
also bounds the strength of a model that wins or loses every comparison."""


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
