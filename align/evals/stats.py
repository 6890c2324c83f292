"""What an evaluation counts before there is an interval of it: `align.ops.intervals` has those.

The unit is the prompt: two answers to one prompt are not two pieces of evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.ops.intervals import grouped


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


def per_prompt(prompt_ids: Sequence[str], values: ArrayLike) -> NDArray[np.float64]:
    """Mean of each prompt's values, in order of first appearance: shape [answers] to [prompts]."""
    return grouped(prompt_ids, values)[0]
