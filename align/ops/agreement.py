"""Agreement beyond chance of two raters, and the interval of any such coefficient: pure functions, without torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.ops.intervals import jackknife, t_quantile


def cohen_kappas(tables_BVV: ArrayLike, quadratic: bool = False) -> NDArray[np.float64]:
    """Cohen's kappa of each of B tables, 1 − Σ w·O / Σ w·E, E being what the raters' frequencies would give by chance;
    shape [B], nan where both always said the same one thing.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales"; 1968, "Weighted kappa".

    Args:
        tables_BVV: how often one said the row's value and the other the column's, values in ascending order.
        quadratic: w = (i − j)², else 1 off the diagonal.
    """
    tables = np.asarray(tables_BVV, dtype=np.float64)
    places = np.arange(tables.shape[-1])
    apart = places[:, None] - places
    weights = apart**2 if quadratic else apart != 0
    total = tables.sum(axis=(1, 2))
    chance = tables.sum(axis=2)[:, :, None] * tables.sum(axis=1)[:, None, :]
    observed = (weights * tables).sum(axis=(1, 2)) * total
    expected = (weights * chance).sum(axis=(1, 2))
    return 1 - np.divide(observed, expected, out=np.full_like(observed, np.nan), where=expected > 0)


def below_one(value: float, left_out: ArrayLike, level: float = 0.95) -> tuple[float | None, float | None]:
    """The interval of a coefficient θ < 1, such as alpha or kappa: that of ln(1 − θ) by its jackknife standard error
    with Student's quantile, taken back to θ.

    The ratio of two means of what is never negative is skewed, and its logarithm is less so.

    Args:
        value: θ of all clusters.
        left_out: θ without each cluster in turn, shape [C].

    Returns:
        Both ends; None where there is one cluster, where θ is undefined without one of them, or where none of them
        changes it.
    """
    without = np.asarray(left_out, dtype=np.float64)
    if without.size < 2:
        return None, None
    error = jackknife(without) / (1 - value)
    if not error > 0:  # nan among them
        return None, None
    factor = math.exp(min(t_quantile(without.size - 1, level) * error, 700.0))
    return 1 - (1 - value) * factor, 1 - (1 - value) / factor
