"""From a rollout to what the learner reads: logprobs, values, rewards, advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from align.core.types import Rollout
from align.models.chunks import in_chunks, several_in_chunks
from align.models.roles import CachedForward, Roles
from align.ops.gae import token_rewards
from align.ops.kl import ESTIMATORS, kl_k1, kl_k3
from align.ops.losses import explained_variance, importance_weights
from align.ops.masking import masked_mean, masked_sum, masked_whiten
from align.ops.moments import Moments
from align.ppo.advantages import Estimator, estimate


class Estimates(NamedTuple):
    """Each [B, T] or [B], without a gradient; values where there is a critic, and `behind_B` where responses that were
    cut are to be valued."""

    old_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    values_BT: Tensor | None
    behind_B: Tensor | None


def estimated(
    roles: Roles, rollout: Rollout, *, temperature: float, micro_batch: int, minibatches: int, bootstrap: bool = False
) -> tuple[Estimates, CachedForward | None]:
    """The estimates of a batch; and the passes behind them, where they serve the first gradient step too.

    Before that step the policy is still the one that sampled. Where the whole batch is one minibatch and one
    micro-batch, the pass that gives the old logprobs is therefore the pass that is learned from, and likewise the
    values': their graphs are kept until then, and two passes are saved.

    Args:
        bootstrap: value the states behind the responses too, in a pass of their own.
    """
    behind = in_chunks(roles.values_behind, rollout, micro_batch) if bootstrap else None
    if minibatches > 1 or micro_batch < len(rollout.ended_B):
        estimates = partial(roles.estimates, temperature=temperature)
        old, reference, *values = several_in_chunks(estimates, rollout, micro_batch)
        return Estimates(old, reference, values[0] if values else None, behind), None
    cached = roles.cached_forward(rollout, temperature)
    reference = in_chunks(lambda part: roles.logprobs("reference", part, temperature)[0], rollout, micro_batch)
    values_BT = None if cached.values_BT is None else cached.values_BT.detach()
    return Estimates(cached.output.logprobs_BT.detach(), reference, values_BT, behind), cached


@dataclass(frozen=True, slots=True)
class Experience:
    """One batch as the learner reads it; every [B, T] is aligned with the response and 0 outside its mask.

    Attributes:
        rollout: the tokens.
        old_logprobs_BT: of the policy that sampled, from the training model's own forward pass.
        ref_logprobs_BT: of the reference.
        advantages_BT: by the estimator of the run.
        values_BT: of the value role before this update; None where there is none.
        returns_BT: what the values are fitted to.
        weights_BT: of the policy loss, where another than the learner drew the tokens.
    """

    rollout: Rollout
    old_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    advantages_BT: Tensor
    values_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    weights_BT: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.rollout.response_mask_BT.shape
        for name, tensor in self.tensors():
            found = tensor.shape
            if found != shape:
                raise ValueError(f"{name} has shape {tuple(found)}, the responses {tuple(shape)}")

    def rows(self, index: Tensor) -> Experience:
        """The rows that `index` selects, without the columns that only pad the others."""
        rollout = self.rollout.rows(index)
        width = rollout.response_mask_BT.shape[1]
        return Experience(rollout, **{name: tensor[index][:, :width] for name, tensor in self.tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each [B, T] that there is, by its name."""
        for name in ("old_logprobs_BT", "ref_logprobs_BT", "advantages_BT", "values_BT", "returns_BT", "weights_BT"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def divided(self) -> list[tuple[Experience, bool]]:
        """The rows that a policy learns something from, with True, and the others, with False: an answer whose group
        earned one and the same has no advantage. A part without rows is left out."""
        teaches_B = (self.advantages_BT != 0).any(1)
        parts = (teaches_B, True), (~teaches_B, False)
        return [(self.rows(rows_B.nonzero()[:, 0]), learns) for rows_B, learns in parts if bool(rows_B.any())]


def shaped_scores(
    raw_B: Tensor,
    rollout: Rollout,
    moments: Moments,
    *,
    score_scale: float,
    score_clip: float | None,
    missing_eos_penalty: float,
) -> Tensor:
    """What each response earns at its last token [B]: its score, standardised by `moments`, clipped to ± `score_clip`
    and scaled, less a penalty where it did not end by itself."""
    standard_B = moments.standardised(raw_B)
    if score_clip is not None:
        standard_B = standard_B.clamp(-score_clip, score_clip)
    return score_scale * standard_B - missing_eos_penalty * (~rollout.ended_B).to(standard_B)


def experience(
    rollout: Rollout,
    scores_B: Tensor,
    old_logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    values_BT: Tensor | None = None,
    behind_B: Tensor | None = None,
    *,
    estimator: Estimator,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    whiten_rewards: bool = False,
    importance_cap: float | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Rewards, advantages and returns of a batch, and the figures that describe it.

    Args:
        scores_B: what each response earns at its last token. Those to one prompt stand together.
        values_BT: of the value role, where the estimator has a critic.
        behind_B: V of the state behind each response, where one that was cut is worth what would have followed; without
            it the cut is taken for an end.
        importance_cap: see `importance_weights`, for a sampler that is not the learner; None for one that is.

    Returns:
        the experience; and `kl` (mean over responses of Σ_t log π − log π_ref, nats), `score`, `reward`, `length`,
        `eos_rate`; with several answers a prompt `prompt_score_std`, how far the prompts' mean scores lie apart; with a
        critic `value` and `explained_variance`; and, where the sampler says its own logprobs,
        `sampler_kl`: how far the learner stood from what sampled, KL(sampler ‖ learner) by k3, the mean over tokens,
        nats.
    """
    mask = rollout.response_mask_BT
    kl_BT = ESTIMATORS[kl_estimator](old_logprobs_BT, ref_logprobs_BT)
    rewards_BT = token_rewards(scores_B, kl_BT, mask, kl_coef if kl_in_reward else 0.0)
    total = masked_sum(rewards_BT, mask) / mask.shape[0]
    if whiten_rewards:
        rewards_BT = masked_whiten(rewards_BT, mask, shift_mean=False)
    if values_BT is not None:
        values_BT = torch.where(mask, values_BT, torch.zeros_like(values_BT))
    bootstrap_B = None if behind_B is None else torch.where(rollout.ended_B, torch.zeros_like(behind_B), behind_B)
    advantages_BT, returns_BT = estimate(estimator, rewards_BT, mask, values_BT, bootstrap_B)
    weights_BT = None
    if importance_cap is not None and rollout.logprobs_BT is not None:
        weights_BT = importance_weights(old_logprobs_BT, rollout.logprobs_BT, mask, importance_cap)
    made = Experience(rollout, old_logprobs_BT, ref_logprobs_BT, advantages_BT, values_BT, returns_BT, weights_BT)
    return made, described(made, scores_B, total, estimator.group_size)


def described(made: Experience, scores_B: Tensor, reward: Tensor, group_size: int) -> dict[str, float]:
    """The figures of a batch, see `experience`.

    Args:
        reward: the mean over responses of what their tokens earned.
        group_size: answers to a prompt, which stand together.
    """
    rollout, mask = made.rollout, made.rollout.response_mask_BT
    lengths_B = rollout.lengths_B
    figures = {
        "kl": masked_sum(kl_k1(made.old_logprobs_BT, made.ref_logprobs_BT), mask) / mask.shape[0],
        "score": scores_B.mean(),
        "score_std": scores_B.std(unbiased=False),
        "reward": reward,
        "length": lengths_B.float().mean(),
        "eos_rate": rollout.ended_B.float().mean(),
        "score_length_correlation": correlation(scores_B, lengths_B.float()),
    }
    if group_size > 1:
        figures["prompt_score_std"] = scores_B.view(-1, group_size).mean(1).std(unbiased=False)
    if made.values_BT is not None and made.returns_BT is not None:
        figures["value"] = masked_mean(made.values_BT, mask)
        figures["explained_variance"] = explained_variance(made.values_BT, made.returns_BT, mask)
    if rollout.logprobs_BT is not None:
        figures["sampler_kl"] = masked_mean(kl_k3(rollout.logprobs_BT, made.old_logprobs_BT), mask)
    return {name: float(figure) for name, figure in figures.items()}


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's r of two [B], in fp64, which holds the squares of what fp32 holds; 0 where either does not vary."""
    dx, dy = (each.double() - each.double().mean() for each in (x, y))
    norm = dx.norm() * dy.norm()
    found = torch.zeros_like(norm) if float(norm) == 0 else (dx * dy).sum() / norm
    return found.to(x.dtype)
