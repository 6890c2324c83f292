"""Checks of PPO on the user's own model, settings and precision.

The results of the code that trains are compared with a plain computation (logits of one row at a time without padding,
sums over tokens written out), with the same batch cut into other micro-batches, and with identities that the first step
must satisfy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.core.types import Rollout
from align.models.fastpath import disable_fast_path
from align.models.forward import get_decoder, split_by_length, unwrap_model
from align.models.roles import CachedForward, Roles
from align.ops.advantages import EPSILON
from align.ops.losses import value_loss
from align.ppo.experience import Estimator, Experience, assemble_experience, compute_estimates
from align.ppo.update import Losses, accumulate_gradients, take_gradient_step
from align.ppo.verify.anchors import Anchor


@dataclass(frozen=True)
class Setting:
    """The user's own model in its roles, a batch that its policy sampled, and the settings of training.

    Attributes:
        micro_batch: fewer rows than the batch has.
        loose: whether the model computes in less than fp32, so that tolerances are wider.
        experience_arguments: arguments of `assemble_experience`.
        bootstrap: whether the value after a response that was cut counts.
    """

    roles: Roles
    rollout: Rollout
    temperature: float
    micro_batch: int
    loose: bool
    experience_arguments: dict[str, Any]
    losses: Losses
    bootstrap: bool = False

    @property
    def scores_B(self) -> Tensor:
        """Random scores of the batch's responses, always the same: the checks hold for any scores."""
        scores_B = torch.randn(len(self.rollout.ended_B), generator=torch.Generator().manual_seed(0))
        return scores_B.to(self.rollout.tokens_BS.device)

    def build_experience(self, micro_batch: int | None = None) -> tuple[Experience, CachedForward | None]:
        """Return the batch with advantages and returns as PPO trains on it, and its forward passes if they are kept,
        else None."""
        estimates, cached = compute_estimates(
            self.roles,
            self.rollout,
            temperature=self.temperature,
            micro_batch=micro_batch or self.micro_batch,
            minibatches=1,
            bootstrap=self.bootstrap,
        )
        return assemble_experience(self.rollout, self.scores_B, *estimates, **self.experience_arguments)[0], cached

    def compute_gradients(
        self, experience: Experience, micro_batch: int, cached: CachedForward | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the gradient of one minibatch as a flat vector for each role, and its metrics, and clear the
        parameters' gradients."""
        figures = accumulate_gradients(
            self.roles, experience, cached, micro_batch=micro_batch, temperature=self.temperature, losses=self.losses
        )
        return {role: pop_gradient(self.roles, role) for role in self.roles.trainable}, figures

    def use_plain_forward(self) -> AbstractContextManager[None]:
        """Return a context manager that replaces the fast path by the forward code of transformers and PEFT. It must
        also enclose backward passes, which may recompute layers."""
        return disable_fast_path(self.roles.model, self.roles.policy)

    def tolerance(self, exact: float, rounded: float) -> float:
        return rounded if self.loose else exact


def check_on_model(setting: Setting, draw: Callable[[], Rollout]) -> Iterator[Anchor]:
    """Run the checks on the user's own model and yield their results; without a critic, those of the policy alone."""
    yield check_ratio(setting)
    yield check_experience(setting)
    yield check_policy_gradient(setting)
    if "value" in setting.roles.trainable:
        yield check_value_gradient(setting)
    yield check_invariance(setting)
    yield check_isolation(setting)
    yield check_sampling(setting, draw)


def pop_gradient(roles: Roles, role: str) -> Tensor:
    """Return the gradients of a role's parameters as one flat fp32 vector, and clear them."""
    parameters = roles.parameters_of(role)
    vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return vector


def compute_relative_error(result: Tensor, expected: Tensor) -> float:
    """Return ‖result − expected‖ / ‖expected‖, or NaN if `expected` is 0, which exceeds every tolerance."""
    return float((result - expected).norm() / expected.norm()) if expected.norm() > 0 else math.nan


# The plain computation: transformers' own forward of one row, no padding, every logit.


def compute_plain_logprobs(setting: Setting, role: str, row: int, train: bool = False) -> Tensor:
    """Return log p of the response tokens [T] of one row under a role, by transformers' own forward without padding."""
    ids, length = read_response_ids(setting.rollout, row)
    with setting.roles.use(role, train) as model, torch.set_grad_enabled(train):
        logits = unwrap_model(model)(input_ids=ids).logits[0, -length - 1 : -1].float()
        log_p = (logits / setting.temperature).log_softmax(-1)
        return log_p.gather(-1, ids[0, -length:, None]).squeeze(-1)


def compute_plain_values(setting: Setting, row: int, train: bool = False) -> Tensor:
    """Return the critic's values [T + 1] before each response token of one row and after the last, by transformers' own
    forward."""
    ids, length = read_response_ids(setting.rollout, row)
    roles = setting.roles
    trained = train and roles.value_backbone == "value"
    assert roles.value_head is not None
    with roles.use(roles.value_backbone, trained) as model, torch.set_grad_enabled(trained):
        states = get_decoder(model)(input_ids=ids).last_hidden_state[0, -length - 1 :].float()
    roles.value_head.requires_grad_(train)
    with torch.set_grad_enabled(train):
        return roles.value_head(states).squeeze(-1)


def read_response_ids(rollout: Rollout, row: int) -> tuple[Tensor, int]:
    """Return the tokens of a row without padding [1, S], and the number of its response tokens."""
    return rollout.tokens_BS[row][rollout.mask_BS[row]][None], int(rollout.response_mask_BT[row].sum())


class Targets(NamedTuple):
    """Old logprobs, advantages and returns [N] of the response tokens of all rows, one row after another."""

    old_logprobs: Tensor
    advantages: Tensor
    returns: Tensor | None = None


def compute_targets(setting: Setting) -> Targets:
    """Compute old logprobs, advantages and returns of the batch in fp64 by their definitions, independently of the
    training code."""
    rollout = setting.rollout
    arguments = setting.experience_arguments
    estimator: Estimator = arguments["estimator"]
    rows = range(len(rollout.ended_B))
    old_logprobs = [compute_plain_logprobs(setting, "policy", b).double() for b in rows]
    log_ratios = [old - compute_plain_logprobs(setting, "reference", b).double() for b, old in enumerate(old_logprobs)]
    kl = [ratio if arguments["kl_estimator"] == "k1" else (-ratio).exp() - 1 + ratio for ratio in log_ratios]
    rewards = [(-arguments["kl_coef"] if arguments["kl_in_reward"] else 0.0) * of_row for of_row in kl]
    for row, score in zip(rewards, setting.scores_B.double(), strict=True):
        row[-1] += score
    if arguments["whiten_rewards"]:
        every = torch.cat(rewards)
        rewards = [(row - every.mean()) / every.std(unbiased=False) + every.mean() for row in rewards]
    if not estimator.has_critic:
        return Targets(torch.cat(old_logprobs), torch.cat(compute_advantages_without_critic(estimator, rewards)))
    advantages = []
    returns = []
    for b, row in enumerate(rewards):
        values = compute_plain_values(setting, b).double()
        values[-1] *= setting.bootstrap and not bool(rollout.ended_B[b])
        td_errors = row + estimator.gamma * values[1:] - values[:-1]
        advantages.append(compute_discounted_sums(td_errors, estimator.gamma * estimator.lam))
        returns.append(advantages[-1] + values[:-1])
    return Targets(torch.cat(old_logprobs), whiten(torch.cat(advantages)), torch.cat(returns))


def compute_advantages_without_critic(estimator: Estimator, rewards: Sequence[Tensor]) -> list[Tensor]:
    """Compute the advantages of each row's tokens for RLOO, GRPO or REINFORCE++ by their definitions, one tensor for
    each row.

    Args:
        rewards: of each row's tokens.
    """
    size = estimator.group_size
    scores = [float(row.sum()) for row in rewards]
    groups = [scores[first : first + size] for first in range(0, len(scores), size)]
    if estimator.name == "reinforce_pp":
        to_go = [compute_discounted_sums(row, estimator.gamma) for row in rewards]
        if size > 1:
            to_go = [row - sum(groups[b // size]) / size for b, row in enumerate(to_go)]
        return list(whiten(torch.cat(to_go)).split([len(row) for row in rewards]))
    advantages = []
    for b, score in enumerate(scores):
        group = groups[b // size]
        if estimator.name == "rloo":
            baseline_scores = [group_score for k, group_score in enumerate(group) if k != b % size]
            advantages.append(score - sum(baseline_scores) / len(baseline_scores))
            continue
        spreads = {"group": group, "batch": scores}
        spread = statistics.stdev(spreads[estimator.scale]) + EPSILON if estimator.scale in spreads else 1.0
        advantages.append((score - sum(group) / size) / spread)
    return [torch.full_like(row, advantage) for row, advantage in zip(rewards, advantages, strict=True)]


def compute_discounted_sums(row: Tensor, factor: float) -> Tensor:
    """Return the discounted sum of the rest of a row from each position t on, Σ_k factor^(k−t) row_k, [T]."""
    sums = [sum(factor ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
    return torch.stack([torch.as_tensor(each) for each in sums])


def whiten(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(unbiased=False)


# The checks.


def check_ratio(setting: Setting) -> Anchor:
    """Check that each token's logprob in the training pass equals its old logprob before the first step, when both come
    from the same policy."""
    experience, _ = setting.build_experience()
    largest = 0.0
    for index in split_by_length(setting.rollout, setting.micro_batch):
        part = experience.rows(index)
        output = setting.roles.logprobs("policy", part.rollout, setting.temperature, train=True)
        largest = max(largest, float((output.logprobs_BT - part.old_logprobs_BT).detach().abs().max()))
    _, figures = setting.compute_gradients(experience, setting.micro_batch)
    off = max(largest, abs(figures["ratio"] - 1), figures["clip_fraction"])
    claim = "π/π_old is 1 at every token before the first step"
    return Anchor("first ratio", claim, off, setting.tolerance(1e-5, 1e-3))


def check_experience(setting: Setting) -> Anchor:
    """Compare logprobs, advantages and returns of the training code with those computed by definition from plain
    logits.

    A swapped role or a wrong mask, position, shift, sign or whitening shows here.
    """
    experience, _ = setting.build_experience()
    mask = setting.rollout.response_mask_BT
    with setting.use_plain_forward():
        expected = compute_targets(setting)
    pairs = [
        (experience.old_logprobs_BT, expected.old_logprobs),
        (experience.advantages_BT, expected.advantages),
    ]
    if experience.returns_BT is not None and expected.returns is not None:
        pairs.append((experience.returns_BT, expected.returns))
    off = max(compute_relative_error(result[mask].double(), right) for result, right in pairs)
    claim = "logprobs, advantages and returns are those of plain logits and of their definitions"
    return Anchor("experience", claim, off, setting.tolerance(1e-4, 0.1))


def check_policy_gradient(setting: Setting) -> Anchor:
    """Compare PPO's policy gradient before the first step with that of REINFORCE with a baseline, −Σ w A ∇ log π.

    The gradient of the KL term is added if it is in the loss. w is 1 / tokens, or the divisor of `loss_mean`.
    """
    roles = setting.roles
    losses = setting.losses
    experience, _ = setting.build_experience()
    gradient = setting.compute_gradients(experience, setting.micro_batch)[0]["policy"]
    lengths = setting.rollout.lengths_B.tolist()
    with setting.use_plain_forward():
        for b, length in enumerate(lengths):
            ref_logprobs = compute_plain_logprobs(setting, "reference", b)
            logprobs = compute_plain_logprobs(setting, "policy", b, train=True)
            log_ratio = logprobs - ref_logprobs
            kl = log_ratio.square() / 2 if losses.kl_estimator == "k2" else (-log_ratio).exp() - 1 + log_ratio
            divisors = {
                "token": sum(lengths),
                "sequence": len(lengths) * length,
                "constant": len(lengths) * losses.longest,
            }
            roles.require_gradients("policy")
            loss = (losses.kl_coef * kl - experience.advantages_BT[b, : len(logprobs)] * logprobs).sum()
            (loss / divisors[losses.loss_mean]).backward()
    expected = pop_gradient(roles, "policy")
    claim = "the policy's first gradient is REINFORCE's with a baseline"
    return Anchor("first gradient", claim, compute_relative_error(gradient, expected), setting.tolerance(1e-4, 0.2))


def check_value_gradient(setting: Setting) -> Anchor:
    """Compare the critic's gradient before the first step, when no value is clipped, with Σ (V − R) ∇V / n."""
    roles = setting.roles
    experience, _ = setting.build_experience()
    assert experience.returns_BT is not None
    gradient = setting.compute_gradients(experience, setting.micro_batch)[0]["value"]
    count = float(setting.rollout.response_mask_BT.sum())
    with setting.use_plain_forward():
        for b in range(len(setting.rollout.ended_B)):
            values = compute_plain_values(setting, b, train=True)[:-1]
            roles.require_gradients("value")
            (0.5 * (values - experience.returns_BT[b, : len(values)]).square().sum() / count).backward()
    expected = pop_gradient(roles, "value")
    claim = "the value's first gradient is that of half the squared error"
    return Anchor("value gradient", claim, compute_relative_error(gradient, expected), setting.tolerance(1e-4, 0.2))


def check_invariance(setting: Setting) -> Anchor:
    """Check that micro-batch size, padding, row order and cached forward passes do not change a gradient."""
    experience, _ = setting.build_experience()
    gradients = setting.compute_gradients(experience, setting.micro_batch)[0]
    rows = len(setting.rollout.ended_B)
    reversed_rows = experience.rows(torch.arange(rows - 1, -1, -1))
    variants = [setting.compute_gradients(reversed_rows, 1)[0]]  # rows of one micro-batch each have no padding
    cached_experience, cached = setting.build_experience(rows)
    variants.append(setting.compute_gradients(cached_experience, rows, cached)[0])
    worst = max(
        compute_relative_error(variant[role], gradient)
        for variant in variants
        for role, gradient in gradients.items()
        if gradient.norm() > 0
    )
    claim = "micro-batch size, padding, row order and cached passes do not change the gradient"
    return Anchor("invariance", claim, worst, setting.tolerance(1e-5, 0.2))


def check_isolation(setting: Setting) -> Anchor:
    """Check that the value loss has no gradient in the policy's weights, and that training does not change the
    reference. The trained weights are restored afterwards."""
    roles = setting.roles
    rollout = setting.rollout
    mask = rollout.response_mask_BT
    leaked = 0.0
    reached_nothing = False
    if "value" in roles.trainable:
        output = roles.logprobs("policy", rollout, setting.temperature, train=True)
        values = roles.values(rollout, train=True, policy_states_BTD=output.states_BTD)
        value_loss(values, values.detach(), torch.ones_like(values), mask, float(mask.sum())).loss.backward()
        leaked = float(pop_gradient(roles, "policy").abs().sum())
        reached_nothing = bool(pop_gradient(roles, "value").norm() == 0)
    before = roles.logprobs("reference", rollout, setting.temperature).logprobs_BT
    parameters = [parameter for role in roles.trainable for parameter in roles.parameters_of(role)]
    saved = [parameter.detach().clone() for parameter in parameters]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    experience, _ = setting.build_experience()
    for _ in range(2):
        accumulate_gradients(
            roles, experience, micro_batch=setting.micro_batch, temperature=setting.temperature, losses=setting.losses
        )
        take_gradient_step(roles, optimiser, 1.0)
    after = roles.logprobs("reference", rollout, setting.temperature).logprobs_BT
    with torch.no_grad():
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
    off = leaked + float((before - after).abs().max()) + float(reached_nothing)
    claim = "the value loss reaches no policy weight, the reference never moves"
    return Anchor("isolation", claim if "value" in roles.trainable else "the reference never moves", off, 0.0)


def check_sampling(setting: Setting, draw: Callable[[], Rollout]) -> Anchor:
    """Check that the mean of −log π over many sampled tokens equals the policy's mean entropy, within standard errors.

    A hidden top-k, top-p, penalty or another temperature makes samples likelier than that.

    Args:
        draw: samples one more batch from the policy.
    """
    differences: list[Tensor] = []
    for _ in range(4):
        rollout = draw()
        output = setting.roles.logprobs("policy", rollout, setting.temperature)
        differences.append((-output.logprobs_BT - output.entropy_BT)[rollout.response_mask_BT])
    difference = torch.cat(differences).double()
    z = float(difference.mean().abs() / (difference.std() / math.sqrt(len(difference))))
    return Anchor("sampling", "samples come from the policy whose logprobs are used (standard errors)", z, 4.5)
