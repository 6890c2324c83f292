"""Advantages without a critic, which compare an answer with the other answers to its prompt.

K answers to one prompt are a group. Row g·K + k is answer k of group g.

    rloo    A_i = R_i − mean of the other K − 1      Ahmadian et al., "Back to basics" (2024); Kool et al. (2019)
    grpo    A_i = (R_i − mean) / spread              Shao et al., "DeepSeekMath" (2024), eq. 3
            A_i = R_i − mean                         Liu et al., "Understanding R1-Zero-like training" (Dr. GRPO, 2025)

All are computed in fp64, so that answers with equal rewards have an advantage of exactly 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4
"""Number added to the standard deviation before dividing by it, as in TRL's GRPOTrainer."""


def group_rewards(rewards_B: Tensor, group_size: int) -> Tensor:
    """Reshape rewards [B] to groups of answers to one prompt, fp64 [G, K].

    Raises:
        ValueError: the rows are not whole groups of two or more.
    """
    if group_size < 2 or len(rewards_B) % group_size:
        raise ValueError(f"{len(rewards_B)} answers do not make groups of {group_size}")
    return rewards_B.double().view(-1, group_size)


def mark_equal_groups(rewards_B: Tensor, group_size: int) -> Tensor:
    """Return True for each group whose answers all have the same reward, bool [G]. Such a group gives no gradient."""
    rewards_GK = group_rewards(rewards_B, group_size)
    return rewards_GK.amax(1) == rewards_GK.amin(1)


def subtract_group_mean(rewards_B: Tensor, group_size: int) -> Tensor:
    """Return each answer's reward minus the mean reward of its group, fp64 [B]."""
    rewards_GK = group_rewards(rewards_B, group_size)
    return (rewards_GK - rewards_GK.mean(1, keepdim=True)).flatten()


def leave_one_out(rewards_B: Tensor, group_size: int) -> Tensor:
    """Return each answer's reward minus the mean reward of the other answers in its group [B], in the dtype of the
    rewards. The mean does not depend on answer i, so that the gradient is unbiased."""
    rewards_GK = group_rewards(rewards_B, group_size)
    others_GK = (rewards_GK.sum(1, keepdim=True) - rewards_GK) / (group_size - 1)
    return (rewards_GK - others_GK).flatten().to(rewards_B.dtype)


def group_relative(rewards_B: Tensor, group_size: int, scale: str) -> Tensor:
    """Return each answer's reward minus the mean of its group, divided by a standard deviation or 1, [B], in the dtype
    of the rewards.

    Args:
        scale: the spread: the standard deviation (divided by n − 1) of the `group` or of the whole `batch`, or 1
            (`none`).
    """
    rewards_GK = group_rewards(rewards_B, group_size)
    centred_B = subtract_group_mean(rewards_B, group_size)
    if scale == "group":
        centred_B = centred_B / (rewards_GK.std(1).repeat_interleave(group_size) + EPSILON)
    elif scale == "batch":
        centred_B = centred_B / (rewards_GK.std() + EPSILON)
    return centred_B.to(rewards_B.dtype)
