"""How well a score tells two kinds apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.ops.intervals import PRIOR, Interval, normal_quantile, wilson


def auc(scores: ArrayLike, wanted: ArrayLike, clusters: Sequence[str], level: float = 0.95) -> Interval:
    """The share of (wanted, unwanted) in which the wanted one has the higher score, ties counted half: the area under
    the ROC curve.

    Its variance is that of clustered data (Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data"). The
    interval is Wilson's at the number of independent trials that have this variance, which is drawn towards the number
    of clusters as in `align.ops.intervals.proportion`: at 0 and 1 it has width.

    Args:
        scores: one a row, shape [n].
        wanted: whether each row is of the one kind.
        clusters: rows of one name depend on each other.

    Raises:
        ValueError: all rows are of one kind.
    """
    x, is_wanted = np.asarray(scores, np.float64), np.asarray(wanted, bool)
    if is_wanted.all() or not is_wanted.any():
        raise ValueError("there are rows of one kind alone")
    above, below = share_below(x[is_wanted], x[~is_wanted]), 1 - share_below(x[~is_wanted], x[is_wanted])
    value = float(above.mean())
    _, at = np.unique(np.asarray(clusters), return_inverse=True)
    of_wanted = summed(at, is_wanted, above - value) / is_wanted.sum()
    of_others = summed(at, ~is_wanted, below - value) / (~is_wanted).sum()
    n = int(at.max()) + 1
    variance = float(((of_wanted + of_others) ** 2).sum()) * n / max(n - 1, 1)
    spread = n * value * (1 - value)
    dispersion = (n * n * variance + PRIOR) / (spread + PRIOR)
    return Interval(value, *wilson(value, n / dispersion, normal_quantile(level)), n)


def share_below(x: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of `others` that lies below each x, ties counted half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, x, "left") + np.searchsorted(ordered, x, "right")
    return below.astype(np.float64) / (2 * len(ordered))


def summed(at: NDArray[np.int_], mine: NDArray[np.bool_], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the rows of one kind add up to in each cluster.

    Args:
        at: the cluster of each row.
        mine: which rows are of that kind.
        values: one for each of these.
    """
    return np.bincount(at[mine], weights=values, minlength=int(at.max()) + 1).astype(np.float64)
