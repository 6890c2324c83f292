"""Advantages without a critic: an answer is compared with the other answers to its prompt.

K answers to one prompt are a group. Row g·K + k is answer k of group g.

    rloo    A_i = R_i − mean of the other K − 1      Ahmadian et al., "Back to basics" (2024); Kool et al. (2019)
    grpo    A_i = (R_i − mean) / spread              Shao et al., "DeepSeekMath" (2024), eq. 3
            A_i = R_i − mean                         Liu et al., "Understanding R1-Zero-like training" (Dr. GRPO, 2025)

All of them are computed in fp64: answers of one reward have an advantage of exactly 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4
"""Added to a spread before it divides, as in TRL's GRPOTrainer."""


def grouped(rewards_B: Tensor, group_size: int) -> Tensor:
    """[B] as [G, K], fp64.

    Raises:
        ValueError: the rows do not make whole groups of two or more.
    """
    if group_size < 2 or len(rewards_B) % group_size:
        raise ValueError(f"{len(rewards_B)} answers do not make groups of {group_size}")
    return rewards_B.double().view(-1, group_size)


def equal_groups(rewards_B: Tensor, group_size: int) -> Tensor:
    """True for each group whose answers all have one reward [G]: it says nothing about which of them is better."""
    rewards_GK = grouped(rewards_B, group_size)
    return rewards_GK.amax(1) == rewards_GK.amin(1)


def less_group_mean(rewards_B: Tensor, group_size: int) -> Tensor:
    """R_i − mean of its group [B], fp64."""
    rewards_GK = grouped(rewards_B, group_size)
    return (rewards_GK - rewards_GK.mean(1, keepdim=True)).flatten()


def leave_one_out(rewards_B: Tensor, group_size: int) -> Tensor:
    """R_i − mean of the others of its group [B], in the dtype of the rewards. What is subtracted does not depend on
    answer i, so that the gradient is unbiased."""
    rewards_GK = grouped(rewards_B, group_size)
    others_GK = (rewards_GK.sum(1, keepdim=True) - rewards_GK) / (group_size - 1)
    return (rewards_GK - others_GK).flatten().to(rewards_B.dtype)


def group_relative(rewards_B: Tensor, group_size: int, scale: str) -> Tensor:
    """(R_i − mean of its group) / spread [B], in the dtype of the rewards.

    Args:
        scale: whose standard deviation (divided by n − 1) divides: the `group`'s, that of the whole `batch`, or
            nobody's (`none`).
    """
    rewards_GK, centred_B = grouped(rewards_B, group_size), less_group_mean(rewards_B, group_size)
    if scale == "group":
        centred_B = centred_B / (rewards_GK.std(1).repeat_interleave(group_size) + EPSILON)
    elif scale == "batch":
        centred_B = centred_B / (rewards_GK.std() + EPSILON)
    return centred_B.to(rewards_B.dtype)
