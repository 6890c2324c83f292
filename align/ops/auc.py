"""The area under the ROC curve, a measure of the separation of two classes by a score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.ops.intervals import PRIOR, Interval, normal_quantile, wilson_interval


def auc(scores: ArrayLike, labels: ArrayLike, clusters: Sequence[str], level: float = 0.95) -> Interval:
    """Return the area under the ROC curve with its interval over clusters. It is the share of (positive, negative)
    pairs of rows in which the positive row has the higher score, ties counted half.

    Its variance is that of clustered data (Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data"). The
    interval is Wilson's at the number of independent trials that have this variance, which is shrunk towards the number
    of clusters as in `align.ops.intervals.proportion_interval`, so that it has a width at 0 and 1.

    Args:
        scores: one for each row, shape [n].
        labels: True for positive rows, shape [n].
        clusters: name of each row's cluster. Rows of one cluster depend on each other.

    Raises:
        ValueError: all rows have the same label.
    """
    x = np.asarray(scores, np.float64)
    positive = np.asarray(labels, bool)
    if positive.all() or not positive.any():
        raise ValueError("there are rows of one kind alone")
    above = compute_share_below(x[positive], x[~positive])
    below = 1 - compute_share_below(x[~positive], x[positive])
    value = float(above.mean())
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    n = int(cluster.max()) + 1
    positive_sums = np.bincount(cluster[positive], weights=above - value, minlength=n)
    negative_sums = np.bincount(cluster[~positive], weights=below - value, minlength=n)
    deviations = positive_sums / positive.sum() + negative_sums / (~positive).sum()
    variance = float((deviations**2).sum()) * n / max(n - 1, 1)
    spread = n * value * (1 - value)
    dispersion = (n * n * variance + PRIOR) / (spread + PRIOR)
    return Interval(value, *wilson_interval(value, n / dispersion, normal_quantile(level)), n)


def compute_share_below(x: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each value of x the share of `others` below it, ties counted half; the shape of x."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, x, "left") + np.searchsorted(ordered, x, "right")
    return below.astype(np.float64) / (2 * len(ordered))
