"""Verdicts on pairs of answers, and the win rate that they add up to."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.columns import Clusters, average_clusters, number_clusters, require_within, to_columns
from align.ops.intervals import Interval, proportion_interval


def compute_wins(score_policy: ArrayLike, score_ref: ArrayLike) -> NDArray[np.float64]:
    """Return, per prompt, 1 if the policy's answer scored higher than the reference's, 0 if lower, ½ if equal; shape
    [n]. Raises ValueError if a score is NaN.

    The mean is the win rate with ties counted as half: a policy compared with itself has exactly ½.
    """
    policy = np.asarray(score_policy, dtype=np.float64)
    ref = np.asarray(score_ref, dtype=np.float64)
    if policy.shape != ref.shape:
        raise ValueError(f"shapes {policy.shape} and {ref.shape} differ: one number a prompt is expected from each")
    if np.isnan(policy).any() or np.isnan(ref).any():
        raise ValueError("a score is NaN, so it can neither win nor lose")
    return np.where(policy > ref, 1.0, np.where(policy < ref, 0.0, 0.5))


def compute_win_rate(verdicts: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Interval:
    """Return the win rate of the first model, a tie counted as half, with Wilson's interval at the effective number of
    clusters. See `align.ops.intervals.proportion_interval`.

    Args:
        verdicts: 1, ½, 0, or means of such, shape [n].
        clusters: the prompt, or what prompts share, of each verdict. Each cluster counts once.

    Raises:
        ValueError: there are no verdicts, one is outside [0, 1] or not finite, or the number of ids differs.
    """
    (wins,) = to_columns(verdicts=verdicts)
    require_within(0, 1, verdicts=wins)
    return proportion_interval(average_clusters(number_clusters(clusters, wins.size), wins), level=level)


def merge_swapped_verdicts(verdicts: ArrayLike, swapped: ArrayLike) -> NDArray[np.float64]:
    """Merge the verdicts on each pair in both orders: equal verdicts are kept, and different ones become a tie (½);
    shape [n].

    Args:
        verdicts, swapped: on the same pairs, with the answers shown in either order. In both, 1 is for the first
            *system*.

    Raises:
        ValueError: a verdict is outside [0, 1] or not finite, or the lengths differ.
    """
    in_order, in_swapped_order = to_columns(verdicts=verdicts, swapped=swapped)
    require_within(0, 1, verdicts=in_order, swapped=in_swapped_order)
    return np.where(in_order == in_swapped_order, in_order, 0.5)
