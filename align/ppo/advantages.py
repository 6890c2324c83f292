"""From token rewards to advantages, by the estimator that `stage.advantage` names. Another one is a branch here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align.ops.advantages import group_relative, leave_one_out, less_group_mean
from align.ops.gae import gae
from align.ops.masking import masked_whiten


class Estimator(NamedTuple):
    """How advantages are estimated.

    Attributes:
        name: `gae` has a critic; `rloo` and `grpo` compare the answers of a group; `reinforce_pp` (Hu et al.,
            "REINFORCE++", 2025) takes what is yet to come, less the mean of the group where an answer has one.
        group_size: answers to a prompt, K.
        scale: of `grpo`, see `group_relative`.
        gamma, lam: discount, and λ of GAE.
    """

    name: str = "gae"
    group_size: int = 1
    scale: str = "group"
    gamma: float = 1.0
    lam: float = 0.95

    @property
    def has_critic(self) -> bool:
        return self.name == "gae"


class Estimated(NamedTuple):
    """Each [B, T], 0 outside the mask; returns where a critic learns from them."""

    advantages_BT: Tensor
    returns_BT: Tensor | None = None


def estimate(
    estimator: Estimator,
    rewards_BT: Tensor,
    mask_BT: Tensor,
    values_BT: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> Estimated:
    """The advantage of each token. `gae` and `reinforce_pp` whiten theirs over the batch.

    Args:
        rewards_BT: 0 outside the mask, see `token_rewards`. Rows of a group stand together.
        values_BT, bootstrap_B: what `gae` takes; of no other estimator.

    Raises:
        ValueError: an estimator with a critic has no values, or one of groups has no whole groups.
    """
    rewards_B = rewards_BT.sum(1)
    match estimator.name:
        case "gae":
            if values_BT is None:
                raise ValueError("gae needs values")
            found = gae(rewards_BT, values_BT, mask_BT, estimator.gamma, estimator.lam, bootstrap_B)
            return Estimated(masked_whiten(found[0], mask_BT), found[1])
        case "reinforce_pp":
            ahead_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, estimator.gamma, 1.0)
            if estimator.group_size > 1:
                mean_B = rewards_B.double() - less_group_mean(rewards_B, estimator.group_size)
                ahead_BT = ahead_BT - mean_B.to(ahead_BT.dtype)[:, None]
            return Estimated(masked_whiten(ahead_BT, mask_BT))
        case "rloo":
            advantages_B = leave_one_out(rewards_B, estimator.group_size)
        case "grpo":
            advantages_B = group_relative(rewards_B, estimator.group_size, estimator.scale)
        case _:
            raise ValueError(estimator.name)
    return Estimated(advantages_B[:, None] * mask_BT)
