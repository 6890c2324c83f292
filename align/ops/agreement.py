"""Chance-corrected agreement of two raters, and the confidence interval of such a coefficient."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.ops.intervals import jackknife_error, t_quantile


def cohen_kappas(tables_BVV: ArrayLike, quadratic: bool = False) -> NDArray[np.float64]:
    """Return Cohen's kappa of each of B contingency tables; shape [B]. It is 1 − Σ w·O / Σ w·E, and nan if both raters
    always gave one and the same value.

    O is the observed table, and E the table expected by chance from the raters' frequencies.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales"; 1968, "Weighted kappa".

    Args:
        tables_BVV: number of items to which one rater gave the row's value and the other the column's, values in
            ascending order.
        quadratic: w = (i − j)², else 1 off the diagonal.
    """
    tables = np.asarray(tables_BVV, dtype=np.float64)
    places = np.arange(tables.shape[-1])
    distances = places[:, None] - places
    weights = distances**2 if quadratic else distances != 0
    total = tables.sum(axis=(1, 2))
    chance = tables.sum(axis=2)[:, :, None] * tables.sum(axis=1)[:, None, :]
    observed = (weights * tables).sum(axis=(1, 2)) * total
    expected = (weights * chance).sum(axis=(1, 2))
    return 1 - np.divide(observed, expected, out=np.full_like(observed, np.nan), where=expected > 0)


def compute_coefficient_interval(
    value: float, left_out: ArrayLike, level: float = 0.95
) -> tuple[float | None, float | None]:
    """Return the confidence interval of an agreement coefficient θ < 1, such as alpha or kappa, from its jackknife
    values over clusters.

    It is the interval of ln(1 − θ) by the jackknife standard error and Student's quantile, transformed back to θ: the
    ratio of two non-negative means is skewed, and its logarithm is less so.

    Args:
        value: θ of all clusters.
        left_out: θ without each cluster in turn, shape [C].

    Returns:
        Both ends. None if there is only one cluster, if θ is undefined without one of them, or if leaving one out never
        changes it.
    """
    estimates = np.asarray(left_out, dtype=np.float64)
    if estimates.size < 2:
        return None, None
    error = jackknife_error(estimates) / (1 - value)
    if not error > 0:  # also nan
        return None, None
    factor = math.exp(min(t_quantile(estimates.size - 1, level) * error, 700.0))
    return 1 - (1 - value) * factor, 1 - (1 - value) / factor
