"""Verdicts on pairs of answers, 1 for the first system, 0 for the second, ½ for a tie, and the share that is won.

The unit is the prompt: two answers to one prompt are not two pieces of evidence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.observed import Clusters, cluster_means, columns, places, within
from align.ops.intervals import Interval, proportion


def win_rate(score_policy: ArrayLike, score_ref: ArrayLike) -> NDArray[np.float64]:
    """Per prompt 1 where the policy's answer scored higher, 0 where lower, ½ where exactly equal; shape [n].

    The mean is the win rate, ties counted as half, so that a policy compared with itself wins exactly ½.
    """
    policy = np.asarray(score_policy, dtype=np.float64)
    ref = np.asarray(score_ref, dtype=np.float64)
    if policy.shape != ref.shape:
        raise ValueError(f"shapes {policy.shape} and {ref.shape} differ: one number a prompt is expected from each")
    if np.isnan(policy).any() or np.isnan(ref).any():
        raise ValueError("a score is NaN: it neither wins nor loses")
    return np.where(policy > ref, 1.0, np.where(policy < ref, 0.0, 0.5))


def share_won(verdicts: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Interval:
    """The win rate of the first system, a tie counted as half, with Wilson's interval at the effective number of
    clusters; see `align.ops.intervals.proportion`.

    Args:
        verdicts: 1, ½, 0, or means of such, shape [n].
        clusters: the prompt, or what prompts share, of each verdict. Each cluster counts once.

    Raises:
        ValueError: no verdicts, one that is outside [0, 1] or not finite, or another number of ids.
    """
    (won,) = columns(verdicts=verdicts)
    within(0, 1, verdicts=won)
    return proportion(cluster_means(places(clusters, won.size), won), level=level)


def surviving(verdicts: ArrayLike, swapped: ArrayLike) -> NDArray[np.float64]:
    """The verdicts that stand in both orders; one that changes with the order is a tie, ½. Shape [n].

    Args:
        verdicts, swapped: on the same pairs, shown in either order; 1 is for the first *system* in both.

    Raises:
        ValueError: a verdict is outside [0, 1] or not finite, or the lengths differ.
    """
    one, other = columns(verdicts=verdicts, swapped=swapped)
    within(0, 1, verdicts=one, swapped=other)
    return np.where(one == other, one, 0.5)
