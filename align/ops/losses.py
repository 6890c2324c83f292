"""The policy and value losses of PPO with their metrics, and the losses of DPO, IPO, ORPO, SimPO and KTO. PPO is that
of Schulman et al., "Proximal policy optimization algorithms", 2017.

PPO's are *sums* over tokens divided by a number of the whole minibatch (`compute_loss_divisor`), which the caller
passes. The sum over micro-batches then has the same gradient for every micro-batch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from align.ops.masking import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class Loss(NamedTuple):
    """A scalar loss to differentiate, and sums over tokens to log, each to be divided by the number of tokens."""

    loss: Tensor
    sums: dict[str, Tensor]


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float,
    divisor: float,
    weights_BT: Tensor | None = None,
    clip_range_high: float | None = None,
    importance_sampling_level: str = "token",
) -> Loss:
    """Return PPO's clipped policy loss (eq. 7), summed over the masked tokens and divided by `divisor`.

        ρ = exp(log π − log π_old),    L = −Σ w min(ρ A, clip(ρ, 1−ε, 1+ε) A) / divisor

    Args:
        divisor: see `compute_loss_divisor`.
        weights_BT: w of each token, see `compute_importance_weights` and `compute_loss_weights`; 1 if None.
        clip_range_high: ε of the upper bound if it differs (Yu et al., DAPO, 2025, eq. 10).
        importance_sampling_level: `sequence` takes one ratio for a response, exp of the mean of log π − log π_old over
            its tokens (Zheng et al., GSPO, 2025, eq. 7).

    Sums: `ratio`, `log_ratio` (|log ρ| of tokens, nats), `clip_fraction` (tokens whose clipped branch is the smaller),
    `approx_kl` (k3 of the step, of tokens).
    """
    log_ratio = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, torch.zeros_like(logprobs_BT))
    ratio = log_ratio.exp()
    if importance_sampling_level == "sequence":
        mean_log_ratio = log_ratio.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True)
        ratio = mean_log_ratio.expand_as(log_ratio).exp()
    unclipped = ratio * advantages_BT
    high = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + high) * advantages_BT
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio, mask_BT),
            "log_ratio": masked_sum(log_ratio.abs(), mask_BT),
            "clip_fraction": masked_sum((clipped < unclipped).to(ratio.dtype), mask_BT),
            "approx_kl": masked_sum(log_ratio.exp() - 1 - log_ratio, mask_BT),
        }
    surrogate = torch.minimum(unclipped, clipped)
    return Loss(-masked_sum(surrogate if weights_BT is None else weights_BT * surrogate, mask_BT) / divisor, sums)


def compute_loss_divisor(mask_BT: Tensor, loss_mean: str, longest: int) -> float:
    """Return the number that divides a minibatch's summed token loss: its tokens, its responses, or its responses times
    `longest`. The sum is weighted by `compute_loss_weights`.

        token      Σ over all tokens / tokens                       equal weight for every token (DAPO, 2025)
        sequence   Σ over responses of the mean over tokens / rows  equal weight for every response (GRPO, 2024)
        constant   Σ over all tokens / (rows · longest)             the gradient is unbiased (Dr. GRPO, 2025)

    Args:
        mask_BT: of the whole minibatch.
        longest: largest number of tokens of a response.
    """
    if loss_mean == "token":
        return float(mask_BT.sum())
    return float(mask_BT.shape[0] * (longest if loss_mean == "constant" else 1))


def compute_loss_weights(mask_BT: Tensor, loss_mean: str) -> Tensor | None:
    """Return each token's weight 1 / (length of its response), [B, T], if `loss_mean` is `sequence`, else None."""
    if loss_mean != "sequence":
        return None
    return (1 / mask_BT.sum(1, keepdim=True)).expand(mask_BT.shape)


def compute_importance_weights(
    old_logprobs_BT: Tensor, drawn_logprobs_BT: Tensor, mask_BT: Tensor, cap: float
) -> Tensor:
    """Return the truncated importance weights of tokens that another policy or engine sampled, without a gradient.

        w = min(π_old / p, cap)

    p is the sampler's distribution: an older policy, or the same policy with another engine's rounding. Sources:
    Espeholt et al., "IMPALA" (2018), the ρ̄ of V-trace; Yao et al., "Your efficient RL framework secretly brings you
    off-policy RL training" (2025), for a separate engine.

    Args:
        drawn_logprobs_BT: the sampler's logprobs.

    Returns:
        [B, T], 0 outside the mask.
    """
    log_weight = torch.where(mask_BT, old_logprobs_BT - drawn_logprobs_BT, torch.zeros_like(old_logprobs_BT)).detach()
    return log_weight.exp().clamp(max=cap) * mask_BT


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    count: float,
    clip_range: float | None = None,
) -> Loss:
    """Return half the squared error of the values to the returns, summed over the masked tokens and divided by `count`.
    With `clip_range`, it is the larger of this error and that of values that are clipped to the old values ±
    `clip_range`.

        L = ½ Σ max((V − R)², (clip(V, V_old ± ε) − R)²) / count

    Sums: `value_error` (squared), `value_clip_fraction`.
    """
    # Mask before the square: its derivative at NaN is NaN, and masking afterwards would compute 0 · NaN = NaN.
    values_BT = torch.where(mask_BT, values_BT, returns_BT.detach())
    error = (values_BT - returns_BT).square()
    larger_error = error
    if clip_range is not None:
        clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
        larger_error = torch.maximum(error, (clipped_BT - returns_BT).square())
    with torch.no_grad():
        sums = {
            "value_error": masked_sum(error, mask_BT),
            "value_clip_fraction": masked_sum((larger_error > error).to(error.dtype), mask_BT),
        }
    return Loss(0.5 * masked_sum(larger_error, mask_BT) / count, sums)


def kl_loss(kl_BT: Tensor, mask_BT: Tensor, divisor: float, weights_BT: Tensor | None = None) -> Tensor:
    """Return the per-token KL to the reference, summed over the mask and divided by `divisor`, as a loss term for
    `kl_in=loss`. The gradient of k1 is that of log π, which has expectation zero; that of k2 is, for each token, the
    gradient of KL(π ‖ π_ref), and that of k3 the gradient of KL(π_ref ‖ π).

    Args:
        divisor, weights_BT: see `compute_loss_divisor` and `compute_loss_weights`.
    """
    return masked_sum(kl_BT if weights_BT is None else weights_BT * kl_BT, mask_BT) / divisor


def compute_explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the share of the returns' variance that the values explain, 1 − Var(R − V) / Var(R) over the mask. It is 0
    if the returns do not vary."""
    returns = returns_BT[mask_BT]
    variance = returns.var(unbiased=False)
    if variance == 0:
        return torch.zeros_like(variance)
    return 1 - (returns - values_BT[mask_BT]).var(unbiased=False) / variance


def dpo_loss(gap_M: Tensor, beta: float, kind: str, labels_M: Tensor | float = 1.0) -> Tensor:
    """Return the mean DPO or IPO loss of M preference pairs, where `kind` is `sigmoid` or `ipo`. With gap = log
    (π/π_ref)(chosen) − log (π/π_ref)(rejected):

    sigmoid:  −p log σ(β · gap) − (1 − p) log σ(−β · gap)    (Rafailov et al., DPO, 2023, eq. 7, with p = 1)
    ipo:      (gap − 1 / 2β)²          (Azar et al., 2023, eq. 17), the logs being means over an answer's tokens

    Args:
        labels_M: p, the probability that the chosen answer is better. 1 − ε for all pairs is label smoothing (Mitchell,
            "A note on DPO with noisy preferences and relationship to IPO", 2023, eq. 3).
    """
    if kind == "ipo":
        return (gap_M - 1 / (2 * beta)).square().mean()
    logprob_M = logsigmoid(beta * gap_M)
    swapped_logprob_M = logsigmoid(-beta * gap_M)
    return -(labels_M * logprob_M + (1 - labels_M) * swapped_logprob_M).mean()


def orpo_loss(chosen_M: Tensor, rejected_M: Tensor, beta: float) -> Tensor:
    """Return ORPO's mean loss of M preference pairs, which needs no reference (Hong et al., ORPO, 2024, eq. 3 to 7).
    With p the geometric mean of the probabilities of an answer's tokens, and odds = p / (1 − p):

        −log p(chosen) − β log σ(log odds(chosen) − log odds(rejected))

    Args:
        chosen_M, rejected_M: log p of the answers of each pair, below 0.
    """
    odds_M = compute_log_odds(chosen_M) - compute_log_odds(rejected_M)
    return -(chosen_M + beta * logsigmoid(odds_M)).mean()


CERTAIN = -1e-6
"""Largest log p whose odds are computed. At 0 they are infinite and their gradient is nan, and fp32 rounds the log p of
a short memorised answer to 0 or above."""


def compute_log_odds(logprobs: Tensor) -> Tensor:
    """Return the log odds log p − log (1 − p) of log-probabilities, which are first clipped to at most `CERTAIN`."""
    logprobs = logprobs.clamp(max=CERTAIN)
    return logprobs - (-torch.expm1(logprobs)).log()


def simpo_loss(chosen_M: Tensor, rejected_M: Tensor, beta: float, gamma: float) -> Tensor:
    """Return SimPO's mean loss of M preference pairs, which needs no reference (Meng et al., SimPO, 2024, eq. 6):

        −log σ(β (log p(chosen) − log p(rejected)) − γ)

    Args:
        chosen_M, rejected_M: see `orpo_loss`.
        gamma: target margin of the chosen answer's reward over the rejected one's.
    """
    return -logsigmoid(beta * (chosen_M - rejected_M) - gamma).mean()


def kto_loss(
    rewards_N: Tensor,
    is_desirable_N: Tensor,
    reference: Tensor,
    beta: float,
    desirable: float,
    undesirable: float,
    weights_N: Tensor | float = 1.0,
) -> Tensor:
    """Return KTO's mean loss of N labelled answers (Ethayarajh et al., KTO, 2024, eq. 8 without its constant):

        desirable:    λ_D (1 − σ(β (r − z)))
        undesirable:  λ_U (1 − σ(β (z − r)))

    Args:
        rewards_N: r, log (π/π_ref) of each answer, in nats.
        is_desirable_N: True for a desirable answer.
        reference: z, see `compute_kto_reference`.
        desirable, undesirable: λ_D and λ_U.
        weights_N: of each answer's loss.
    """
    margin_N = torch.where(is_desirable_N, rewards_N - reference, reference - rewards_N)
    kind_weights_N = torch.where(
        is_desirable_N, torch.full_like(margin_N, desirable), torch.full_like(margin_N, undesirable)
    )
    return (weights_N * kind_weights_N * torch.sigmoid(-beta * margin_N)).mean()


def compute_kto_reference(mismatched_N: Tensor) -> Tensor:
    """Return the reference point z of `kto_loss`, an estimate of the policy's KL to its reference that is at least 0.
    It is the mean of log (π/π_ref) of answers to other prompts [N]."""
    return mismatched_N.mean().clamp_min(0)
