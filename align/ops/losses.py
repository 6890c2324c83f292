"""The two losses of PPO, each with its figures (Schulman et al., "Proximal policy optimization algorithms", 2017), and
those of learning from preferences directly: DPO and its kin.

PPO's are *sums* over tokens divided by a number that the caller gives, of the whole minibatch: its tokens, or another
(`loss_divisor`). Summing over micro-batches then gives the same gradient however the minibatch was cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import logsigmoid

from align.ops.masking import masked_sum

if TYPE_CHECKING:
    from torch import Tensor


class Loss(NamedTuple):
    """A scalar to differentiate and token sums to log (divide by the same count)."""

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
    """The clipped surrogate (eq. 7), negated.

        ρ = exp(log π − log π_old),    L = −Σ w min(ρ A, clip(ρ, 1−ε, 1+ε) A) / divisor

    Args:
        divisor: see `loss_divisor`.
        weights_BT: w of each token, see `importance_weights` and `loss_weights`; without them 1.
        clip_range_high: ε of the upper bound, where it is another (Yu et al., DAPO, 2025, eq. 10).
        importance_sampling_level: `sequence` takes one ratio for a response, exp of the mean of log π − log π_old over
            its tokens (Zheng et al., GSPO, 2025, eq. 7).

    Sums: `ratio`, `log_ratio` (|log ρ| of tokens, nats), `clip_fraction` (tokens where the clipped branch is the
    smaller), `approx_kl` (k3 of the step, of tokens).
    """
    log_ratio = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, torch.zeros_like(logprobs_BT))
    level = log_ratio
    if importance_sampling_level == "sequence":
        level = (log_ratio.sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True)).expand_as(log_ratio)
    ratio = level.exp()
    free = ratio * advantages_BT
    above = clip_range if clip_range_high is None else clip_range_high
    clipped = ratio.clamp(1 - clip_range, 1 + above) * advantages_BT
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio, mask_BT),
            "log_ratio": masked_sum(log_ratio.abs(), mask_BT),
            "clip_fraction": masked_sum((clipped < free).to(ratio.dtype), mask_BT),
            "approx_kl": masked_sum(log_ratio.exp() - 1 - log_ratio, mask_BT),
        }
    gain = torch.minimum(free, clipped)
    return Loss(-masked_sum(gain if weights_BT is None else weights_BT * gain, mask_BT) / divisor, sums)


def loss_divisor(mask_BT: Tensor, loss_mean: str, longest: int) -> float:
    """What a sum over the tokens of a minibatch is divided by, with `loss_weights`.

        token      Σ over all tokens / tokens                       every token counts alike (DAPO, 2025)
        sequence   Σ over responses of the mean over tokens / rows  every response counts alike (GRPO, 2024)
        constant   Σ over all tokens / (rows · longest)             the gradient is unbiased (Dr. GRPO, 2025)

    Args:
        mask_BT: of the whole minibatch.
        longest: tokens that a response may have.
    """
    if loss_mean == "token":
        return float(mask_BT.sum())
    return float(mask_BT.shape[0] * (longest if loss_mean == "constant" else 1))


def loss_weights(mask_BT: Tensor, loss_mean: str) -> Tensor | None:
    """1 / length of each token's response, where `loss_mean` takes the mean of each response first; else None."""
    if loss_mean != "sequence":
        return None
    return (1 / mask_BT.sum(1, keepdim=True)).expand(mask_BT.shape)


def importance_weights(old_logprobs_BT: Tensor, drawn_logprobs_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """What makes tokens that another policy drew count as if the learner had drawn them, truncated; no gradient.

        w = min(π_old / p, cap)

    p is what the sampler drew with: an older policy, or the same in another engine's rounding. Truncated importance
    sampling: Espeholt et al., "IMPALA" (2018), of whose V-trace it is ρ̄; Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training" (2025), for an engine beside the learner.

    Args:
        drawn_logprobs_BT: of the sampler.

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
    """Half the squared error to the returns; with `clip_range`, the larger of it and the error of values that may move
    only so far from the old ones.

        L = ½ Σ max((V − R)², (clip(V, V_old ± ε) − R)²) / count

    Sums: `value_error` (squared), `value_clip_fraction`.
    """
    # Before the square: its derivative at NaN is NaN, and 0 · NaN from a mask behind it would be NaN still.
    values_BT = torch.where(mask_BT, values_BT, returns_BT.detach())
    error = (values_BT - returns_BT).square()
    worst = error
    if clip_range is not None:
        bounded = old_values_BT + (values_BT - old_values_BT).clamp(-clip_range, clip_range)
        worst = torch.maximum(error, (bounded - returns_BT).square())
    with torch.no_grad():
        sums = {
            "value_error": masked_sum(error, mask_BT),
            "value_clip_fraction": masked_sum((worst > error).to(error.dtype), mask_BT),
        }
    return Loss(0.5 * masked_sum(worst, mask_BT) / count, sums)


def kl_loss(kl_BT: Tensor, mask_BT: Tensor, divisor: float, weights_BT: Tensor | None = None) -> Tensor:
    """Mean KL to the reference as a term of the loss, for `kl_in=loss`. The gradient of k1 is that of log π alone,
    which has expectation zero; that of k2 is, token by token, KL(π ‖ π_ref)'s, and that of k3 KL(π_ref ‖ π)'s.

    Args:
        divisor, weights_BT: see `loss_divisor` and `loss_weights`.
    """
    return masked_sum(kl_BT if weights_BT is None else weights_BT * kl_BT, mask_BT) / divisor


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the mask; 0 where the returns do not vary."""
    values, returns = values_BT[mask_BT], returns_BT[mask_BT]
    spread = returns.var(unbiased=False)
    return torch.zeros_like(spread) if spread == 0 else 1 - (returns - values).var(unbiased=False) / spread


def dpo_loss(gap_M: Tensor, beta: float, kind: str, label_smoothing: float = 0.0) -> Tensor:
    """The loss of M pairs, their mean. With the gap of a pair, log (π/π_ref)(chosen) − log (π/π_ref)(rejected):

    sigmoid:  −(1 − ε) log σ(β · gap) − ε log σ(−β · gap)    (Rafailov et al., DPO, 2023, eq. 7, where ε = 0)
    ipo:      (gap − 1 / 2β)²          (Azar et al., 2023, eq. 17), the logs being means over an answer's tokens

    Args:
        label_smoothing: ε, the share of the pairs that are labelled the wrong way round (Mitchell, "A note on DPO with
            noisy preferences and relationship to IPO", 2023, eq. 3).
    """
    if kind == "ipo":
        return (gap_M - 1 / (2 * beta)).square().mean()
    right, wrong = logsigmoid(beta * gap_M), logsigmoid(-beta * gap_M)
    return -((1 - label_smoothing) * right + label_smoothing * wrong).mean()


def orpo_loss(chosen_M: Tensor, rejected_M: Tensor, beta: float) -> Tensor:
    """The loss of M pairs without a reference, their mean (Hong et al., ORPO, 2024, eq. 3 to 7). With p the geometric
    mean of the probabilities of an answer's tokens, and odds = p / (1 − p):

        −log p(chosen) − β log σ(log odds(chosen) − log odds(rejected))

    Args:
        chosen_M, rejected_M: log p of the answers of each pair, below 0.
    """
    odds_M = log_odds(chosen_M) - log_odds(rejected_M)
    return -(chosen_M + beta * logsigmoid(odds_M)).mean()


CERTAIN = -1e-6
"""A log p that no odds are computed above: at 0 they are infinite and their gradient is nan, and fp32 rounds the log p
of a short answer that was learned by heart to 0 or beyond."""


def log_odds(logprobs: Tensor) -> Tensor:
    """log p − log (1 − p), for p up to `CERTAIN`."""
    logprobs = logprobs.clamp(max=CERTAIN)
    return logprobs - (-torch.expm1(logprobs)).log()


def simpo_loss(chosen_M: Tensor, rejected_M: Tensor, beta: float, gamma: float) -> Tensor:
    """The loss of M pairs without a reference, their mean (Meng et al., SimPO, 2024, eq. 6):

        −log σ(β (log p(chosen) − log p(rejected)) − γ)

    Args:
        chosen_M, rejected_M: see `orpo_loss`.
        gamma: by how much the reward of the better answer is to exceed the other's.
    """
    return -logsigmoid(beta * (chosen_M - rejected_M) - gamma).mean()


def kto_loss(
    rewards_N: Tensor,
    wanted_N: Tensor,
    reference: Tensor,
    beta: float,
    desirable: float,
    undesirable: float,
) -> Tensor:
    """The loss of N answers with a label, their mean (Ethayarajh et al., KTO, 2024, eq. 8 without its constant):

        wanted:    λ_D (1 − σ(β (r − z)))
        unwanted:  λ_U (1 − σ(β (z − r)))

    Args:
        rewards_N: r, log (π/π_ref) of each answer, in nats.
        wanted_N: True where the answer was wanted.
        reference: z, see `kto_reference`.
        desirable, undesirable: λ_D and λ_U.
    """
    above_N = torch.where(wanted_N, rewards_N - reference, reference - rewards_N)
    weights_N = torch.where(wanted_N, torch.full_like(above_N, desirable), torch.full_like(above_N, undesirable))
    return (weights_N * torch.sigmoid(-beta * above_N)).mean()


def kto_reference(mismatched_N: Tensor) -> Tensor:
    """What KTO compares rewards with: the KL of the policy from its start, estimated as the mean of log (π/π_ref) of
    answers to other prompts [N], and at least 0."""
    return mismatched_N.mean().clamp_min(0)
