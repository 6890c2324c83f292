"""Generalised advantage estimation on responses of different length.

Schulman et al., "High-dimensional continuous control using generalized advantage estimation" (2016), eq. 11–16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def compute_token_rewards(
    scores_B: Tensor,
    kl_BT: Tensor,
    mask_BT: Tensor,
    kl_coef: float,
) -> Tensor:
    """Return the reward of each token: −kl_coef · KL everywhere, and the response's score at its last token.

    Args:
        scores_B: one score for each response.
        kl_BT: per-token KL to the reference, nats. Values outside the mask are ignored.
        mask_BT: True on response tokens. Responses start in column 0; each has at least one token.

    Returns:
        rewards_BT: 0 outside the mask.

    Raises:
        ValueError: a response has no token that could carry its score.
    """
    lengths_B = mask_BT.sum(-1)
    if bool((lengths_B == 0).any()):
        raise ValueError("a response without tokens cannot carry its score")
    rewards_BT = torch.where(mask_BT, -kl_coef * kl_BT, torch.zeros_like(kl_BT))
    rows = torch.arange(mask_BT.shape[0], device=mask_BT.device)
    rewards_BT[rows, lengths_B - 1] += scores_B.to(rewards_BT.dtype)
    return rewards_BT


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantages, and returns (advantage plus value), for each response token.

        δ_t = r_t + γ V_{t+1} − V_t,    A_t = δ_t + γ λ A_{t+1},    R_t = A_t + V_t

    Time: `values[t]` is V of the state *before* token t (prompt and tokens < t), `rewards[t]` is the reward of token t.
    V after the last token is 0, or `bootstrap_B` if given (for a response that was cut at the length limit).

    Args:
        rewards_BT, values_BT: values outside the mask are ignored.
        mask_BT: True on response tokens, contiguous from column 0.

    Returns:
        advantages_BT, returns_BT: 0 outside the mask.
    """
    device = values_BT.device
    if device.type != "cpu":  # the loop over T would launch thousands of small kernels
        bootstrap = None if bootstrap_B is None else bootstrap_B.cpu()
        advantages, returns = gae(rewards_BT.cpu(), values_BT.cpu(), mask_BT.cpu(), gamma, lam, bootstrap)
        return advantages.to(device), returns.to(device)
    zero = torch.zeros_like(values_BT[:, 0])
    lengths_B = mask_BT.sum(-1)
    advantage_B = zero
    next_value_B = zero
    columns = []
    for t in reversed(range(mask_BT.shape[1])):
        inside_B = mask_BT[:, t]
        if bootstrap_B is not None:
            next_value_B = torch.where(lengths_B - 1 == t, bootstrap_B, next_value_B)
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(inside_B, delta_B + gamma * lam * advantage_B, zero)
        next_value_B = torch.where(inside_B, values_BT[:, t], zero)
        columns.append(advantage_B)
    advantages_BT = torch.stack(columns[::-1], dim=1)
    returns_BT = torch.where(mask_BT, advantages_BT + values_BT, torch.zeros_like(values_BT))
    return advantages_BT, returns_BT
