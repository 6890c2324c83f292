"""Conversion of a rollout to a batch of experience: logprobs, values, rewards, advantages and returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from align.core.types import Rollout
from align.models.forward import compute_in_chunks, compute_several_in_chunks
from align.models.roles import CachedForward, Roles
from align.ops.advantages import group_relative, leave_one_out, subtract_group_mean
from align.ops.gae import compute_token_rewards, gae
from align.ops.kl import ESTIMATORS, kl_k1, kl_k3
from align.ops.losses import compute_explained_variance, compute_importance_weights
from align.ops.masking import masked_mean, masked_sum, masked_whiten
from align.ops.moments import Moments


class Estimator(NamedTuple):
    """The settings of the advantage estimator: its name, group size, discount and scale.

    Attributes:
        name: `gae` has a critic; `rloo` and `grpo` compare the answers of a group; `reinforce_pp` (Hu et al.,
            "REINFORCE++", 2025) takes the reward to go, less the mean reward of the group if groups have several
            answers.
        group_size: answers to a prompt, K.
        scale: what `grpo` divides by, see `group_relative`.
        gamma: discount.
        lam: λ of GAE.
    """

    name: str = "gae"
    group_size: int = 1
    scale: str = "group"
    gamma: float = 1.0
    lam: float = 0.95

    @property
    def has_critic(self) -> bool:
        return self.name == "gae"


def estimate_advantages(
    estimator: Estimator,
    rewards_BT: Tensor,
    mask_BT: Tensor,
    values_BT: Tensor | None = None,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Estimate the advantage of each token from the rewards by GAE, RLOO, GRPO or REINFORCE++, and return it with the
    critic's targets. Both are [B, T] and 0 outside the mask. Only GAE has targets (returns); the others return None.

    `gae` and `reinforce_pp` whiten the advantages over the batch. Another estimator is another branch here.

    Args:
        rewards_BT: 0 outside the mask, see `compute_token_rewards`. Rows of a group stand together.
        values_BT: V before each token. `gae` alone reads it.
        bootstrap_B: V after the last token of each response, see `gae`. `gae` alone reads it.

    Raises:
        ValueError: values are missing for `gae`, or the rows are not whole groups.
    """
    rewards_B = rewards_BT.sum(1)
    match estimator.name:
        case "gae":
            if values_BT is None:
                raise ValueError("gae needs values")
            advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, estimator.gamma, estimator.lam, bootstrap_B)
            return masked_whiten(advantages_BT, mask_BT), returns_BT
        case "reinforce_pp":
            to_go_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, estimator.gamma, 1.0)
            if estimator.group_size > 1:
                mean_B = rewards_B.double() - subtract_group_mean(rewards_B, estimator.group_size)
                to_go_BT = to_go_BT - mean_B.to(to_go_BT.dtype)[:, None]
            return masked_whiten(to_go_BT, mask_BT), None
        case "rloo":
            advantages_B = leave_one_out(rewards_B, estimator.group_size)
        case "grpo":
            advantages_B = group_relative(rewards_B, estimator.group_size, estimator.scale)
        case _:
            raise ValueError(estimator.name)
    return advantages_B[:, None] * mask_BT, None


class Estimates(NamedTuple):
    """Logprobs of policy and reference, and values, for a batch, without gradients.

    Attributes:
        values_BT: None if there is no critic.
        last_values_B: V after the last token of each response; None if cut responses count as ended.
    """

    old_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    values_BT: Tensor | None
    last_values_B: Tensor | None


def compute_estimates(
    roles: Roles, rollout: Rollout, *, temperature: float, micro_batch: int, minibatches: int, bootstrap: bool = False
) -> tuple[Estimates, CachedForward | None]:
    """Compute the policy's and reference's logprobs and the values of a rollout, without gradients. Also returns the
    forward passes that the first gradient step can use again, or None.

    Before that step the policy is still the one that sampled. If the whole batch is one minibatch and one micro-batch,
    the pass that gives the old logprobs is also the pass of the first step, and so is that of the values: their graphs
    are kept, which saves two passes. In all other cases no passes are returned.

    Args:
        bootstrap: also value the state after each response, in a pass of its own.
    """
    last_values_B = compute_in_chunks(roles.compute_final_values, rollout, micro_batch) if bootstrap else None
    if minibatches > 1 or micro_batch < len(rollout.ended_B):
        estimates = partial(roles.estimates, temperature=temperature)
        old, reference, *values = compute_several_in_chunks(estimates, rollout, micro_batch)
        return Estimates(old, reference, values[0] if values else None, last_values_B), None
    cached = roles.run_cached_forward(rollout, temperature)
    reference = compute_in_chunks(lambda part: roles.logprobs("reference", part, temperature)[0], rollout, micro_batch)
    values_BT = None if cached.values_BT is None else cached.values_BT.detach()
    return Estimates(cached.output.logprobs_BT.detach(), reference, values_BT, last_values_B), cached


@dataclass(frozen=True, slots=True)
class Experience:
    """A batch of rollouts with logprobs, advantages and returns for PPO's gradient steps. Every [B, T] is aligned with
    the response and 0 outside its mask.

    Attributes:
        old_logprobs_BT: the policy's logprobs before this update, from the training model's own forward pass.
        ref_logprobs_BT: the reference's logprobs.
        values_BT: the value role's values before this update; None without a critic.
        returns_BT: the targets of the values; None without a critic.
        weights_BT: importance weights of the policy loss; None if the learner itself sampled the tokens.
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
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the responses {tuple(shape)}")

    def rows(self, index: Tensor) -> Experience:
        """Return the rows at `index` as a smaller batch, without columns that are padding in all of them."""
        rollout = self.rollout.rows(index)
        width = rollout.response_mask_BT.shape[1]
        return Experience(rollout, **{name: tensor[index][:, :width] for name, tensor in self.tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and value of each per-token tensor [B, T] that is not None."""
        for name in ("old_logprobs_BT", "ref_logprobs_BT", "advantages_BT", "values_BT", "returns_BT", "weights_BT"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def split_by_learning(self) -> list[tuple[Experience, bool]]:
        """Split the batch into rows with a nonzero advantage, marked True, and rows without one, marked False. An empty
        part is left out.

        Answers of a group with equal rewards have no advantage.
        """
        teaches_B = (self.advantages_BT != 0).any(1)
        parts = (teaches_B, True), (~teaches_B, False)
        return [(self.rows(rows_B.nonzero()[:, 0]), learns) for rows_B, learns in parts if bool(rows_B.any())]


def shape_scores(
    raw_B: Tensor,
    rollout: Rollout,
    moments: Moments,
    *,
    score_scale: float,
    score_clip: float | None,
    missing_eos_penalty: float,
) -> Tensor:
    """Convert raw scores to rewards of the responses [B]: standardise, clip and scale them, and subtract a penalty from
    unfinished responses. The reward counts at the response's last token.

    This is its score, standardised by `moments`, clipped to ± `score_clip` and scaled, less `missing_eos_penalty` if
    the response did not end by itself.
    """
    standard_B = moments.standardise(raw_B)
    if score_clip is not None:
        standard_B = standard_B.clamp(-score_clip, score_clip)
    return score_scale * standard_B - missing_eos_penalty * (~rollout.ended_B).to(standard_B)


def assemble_experience(
    rollout: Rollout,
    scores_B: Tensor,
    old_logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    values_BT: Tensor | None = None,
    last_values_B: Tensor | None = None,
    *,
    estimator: Estimator,
    kl_coef: float,
    kl_estimator: str,
    kl_in_reward: bool,
    whiten_rewards: bool = False,
    importance_cap: float | None = None,
) -> tuple[Experience, dict[str, float]]:
    """Compute token rewards, advantages and returns of a rollout, and return them as experience with metrics of the
    batch.

    Args:
        scores_B: the reward of each response at its last token. Responses to one prompt are consecutive.
        values_BT: values of the value role, if the estimator has a critic.
        last_values_B: V after each response, used as the remaining reward of responses that were cut. None treats a cut
            response as ended.
        importance_cap: see `compute_importance_weights`; None if the learner itself sampled.

    Returns:
        The experience; and `kl` (mean over responses of Σ_t log π − log π_ref, nats), `score`, `reward`, `length` and
        `eos_rate`; with several answers to each prompt `prompt_score_std`, the deviation of the prompts' mean scores;
        with a critic `value` and `explained_variance`; and, if the sampler reports its own logprobs, `sampler_kl`:
        KL(sampler ‖ learner) by k3, mean over tokens, nats.
    """
    mask = rollout.response_mask_BT
    kl_BT = ESTIMATORS[kl_estimator](old_logprobs_BT, ref_logprobs_BT)
    rewards_BT = compute_token_rewards(scores_B, kl_BT, mask, kl_coef if kl_in_reward else 0.0)
    total = masked_sum(rewards_BT, mask) / mask.shape[0]
    if whiten_rewards:
        rewards_BT = masked_whiten(rewards_BT, mask, shift_mean=False)
    if values_BT is not None:
        values_BT = torch.where(mask, values_BT, torch.zeros_like(values_BT))
    bootstrap_B = None if last_values_B is None else last_values_B.masked_fill(rollout.ended_B, 0.0)
    advantages_BT, returns_BT = estimate_advantages(estimator, rewards_BT, mask, values_BT, bootstrap_B)
    weights_BT = None
    if importance_cap is not None and rollout.logprobs_BT is not None:
        weights_BT = compute_importance_weights(old_logprobs_BT, rollout.logprobs_BT, mask, importance_cap)
    experience = Experience(rollout, old_logprobs_BT, ref_logprobs_BT, advantages_BT, values_BT, returns_BT, weights_BT)
    return experience, summarize_experience(experience, scores_B, total, estimator.group_size)


def summarize_experience(experience: Experience, scores_B: Tensor, reward: Tensor, group_size: int) -> dict[str, float]:
    """Return the mean KL, score, length and other metrics of a batch of experience, see `assemble_experience`.

    Args:
        reward: the mean over responses of the sum of their token rewards.
        group_size: answers to a prompt, which stand together.
    """
    rollout = experience.rollout
    mask = rollout.response_mask_BT
    lengths_B = rollout.lengths_B
    figures = {
        "kl": masked_sum(kl_k1(experience.old_logprobs_BT, experience.ref_logprobs_BT), mask) / mask.shape[0],
        "score": scores_B.mean(),
        "score_std": scores_B.std(unbiased=False),
        "reward": reward,
        "length": lengths_B.float().mean(),
        "eos_rate": rollout.ended_B.float().mean(),
        "score_length_correlation": pearson_r(scores_B, lengths_B.float()),
    }
    if group_size > 1:
        figures["prompt_score_std"] = scores_B.view(-1, group_size).mean(1).std(unbiased=False)
    if experience.values_BT is not None and experience.returns_BT is not None:
        figures["value"] = masked_mean(experience.values_BT, mask)
        figures["explained_variance"] = compute_explained_variance(experience.values_BT, experience.returns_BT, mask)
    if rollout.logprobs_BT is not None:
        figures["sampler_kl"] = masked_mean(kl_k3(rollout.logprobs_BT, experience.old_logprobs_BT), mask)
    return {name: float(figure) for name, figure in figures.items()}


def pearson_r(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of two tensors [B], or 0 if either is constant. It is computed in fp64, which holds
    the squares of fp32."""
    dx = x.double() - x.double().mean()
    dy = y.double() - y.double().mean()
    norm = dx.norm() * dy.norm()
    r = torch.zeros_like(norm) if float(norm) == 0 else (dx * dy).sum() / norm
    return r.to(x.dtype)
