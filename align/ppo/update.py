"""Gradient steps of PPO on one batch of experience."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from align import ranks
from align.core.errors import InputError, require
from align.models.finite_checks import describe_non_finite
from align.models.forward import split_by_length
from align.models.roles import CachedForward, ForwardOutput, Roles
from align.ops.kl import ESTIMATORS
from align.ops.losses import Loss, compute_loss_divisor, compute_loss_weights, kl_loss, policy_loss, value_loss
from align.ops.masking import masked_sum
from align.ppo.experience import Experience


def split_minibatches(rows: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffle the row numbers from 0 to `rows` and split them into `count` equal minibatches."""
    return list(torch.randperm(rows, generator=generator).split(rows // count))


class Losses(NamedTuple):
    """The settings of the policy loss, the value loss and the KL term.

    Attributes:
        clip_range, clip_range_high, importance_sampling_level: arguments of `policy_loss`.
        loss_mean, longest: arguments of `compute_loss_divisor`.
        value_clip_range: argument of `value_loss`.
        kl_coef, kl_estimator: the term of `kl_loss`; 0 leaves it out.
    """

    clip_range: float = 0.2
    clip_range_high: float | None = None
    importance_sampling_level: str = "token"
    loss_mean: str = "token"
    longest: int = 0
    value_clip_range: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k1"


def accumulate_gradients(
    roles: Roles,
    minibatch: Experience,
    cached: CachedForward | None = None,
    *,
    micro_batch: int,
    temperature: float,
    losses: Losses,
) -> dict[str, float]:
    """Compute the policy and value losses of one minibatch in micro-batches, accumulate their gradients, and return
    metrics.

    Each loss is a sum over tokens divided by a number of the *whole* minibatch, so that neither the size of the
    micro-batches nor their padding changes the gradient. Each rank computes its share of the micro-batches; gradients
    and figures are those of all ranks. Rows that teach nothing go through the model for the figures alone, without a
    backward pass.

    Args:
        cached: forward passes over exactly this minibatch, in this order of rows; None to make them here.

    Returns:
        token means over the minibatch.
    """
    whole_mask = minibatch.rollout.response_mask_BT
    divisor = compute_loss_divisor(whole_mask, losses.loss_mean, losses.longest)
    count = float(whole_mask.sum())
    can_split = not cached and needs_advantages_only(minibatch, losses)
    shares = minibatch.split_by_learning() if can_split else [(minibatch, True)]
    chunks = [(share, rows, learns) for share, learns in shares for rows in split_by_length(share.rollout, micro_batch)]
    parts = ((share.rows(rows), learns) for share, rows, learns in ranks.select_own_share(chunks))
    sums_of_parts = []
    for part, learns in [(minibatch, True)] if cached else parts:
        mask = part.rollout.response_mask_BT
        output = cached.output if cached else roles.logprobs("policy", part.rollout, temperature, train=learns)
        policy = compute_policy_loss(output, part, divisor, losses)
        if learns:
            roles.require_gradients("policy")
            policy.loss.backward()
        sums = {**policy.sums, "entropy": masked_sum(output.entropy_BT, mask)}
        if part.values_BT is not None and part.returns_BT is not None:
            values_BT = cached.values_BT if cached else None
            if values_BT is None:
                values_BT = roles.values(part.rollout, True, policy_states_BTD=output.states_BTD)
            value = value_loss(values_BT, part.values_BT, part.returns_BT, mask, count, losses.value_clip_range)
            roles.require_gradients("value")
            value.loss.backward()
            sums |= value.sums
        sums_of_parts.append(sums)
    ranks.sum_gradients(p for role in roles.trainable for p in roles.parameters_of(role))
    figures = sum_figures(sums_of_parts, len(chunks))
    loss = figures.pop("policy_loss") / divisor
    return {**{name: total / count for name, total in figures.items()}, "policy_loss": loss}


def needs_advantages_only(minibatch: Experience, losses: Losses) -> bool:
    """Return True if rows with zero advantage have no gradient, because there is neither a critic nor a KL term in the
    loss."""
    return minibatch.values_BT is None and not losses.kl_coef


def compute_policy_loss(output: ForwardOutput, part: Experience, divisor: float, losses: Losses) -> Loss:
    """Compute the clipped policy loss of a micro-batch, plus the KL term if it has a coefficient. The metric
    `policy_loss` leaves out the KL term."""
    mask = part.rollout.response_mask_BT
    row_weights = compute_loss_weights(mask, losses.loss_mean)
    weights = part.weights_BT
    if row_weights is not None:
        weights = row_weights if weights is None else weights * row_weights
    policy = policy_loss(
        output.logprobs_BT,
        part.old_logprobs_BT,
        part.advantages_BT,
        mask,
        losses.clip_range,
        divisor,
        weights,
        losses.clip_range_high,
        losses.importance_sampling_level,
    )
    loss = policy.loss
    if losses.kl_coef:
        kl_BT = ESTIMATORS[losses.kl_estimator](output.logprobs_BT, part.ref_logprobs_BT)
        loss = loss + losses.kl_coef * kl_loss(kl_BT, mask, divisor, row_weights)
    return Loss(loss, {**policy.sums, "policy_loss": policy.loss.detach().double() * divisor})


def sum_figures(sums_of_parts: Sequence[Mapping[str, Tensor]], chunks: int) -> dict[str, float]:
    """Return the sum of each metric over the micro-batches of all ranks.

    Args:
        sums_of_parts: this rank's sums, by figure, of each of its micro-batches.
        chunks: number of micro-batches of all ranks.
    """
    own_rows = []
    if sums_of_parts:  # a rank may have no share
        names = list(sums_of_parts[0])
        sums = torch.stack([torch.stack([part[name].double() for name in names]) for part in sums_of_parts])
        own_rows = [dict(zip(names, row, strict=True)) for row in sums.tolist()]  # one transfer from the device
    rows = ranks.gather_shares(own_rows, chunks)
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def take_gradient_step(roles: Roles, optimiser: Optimizer, max_grad_norm: float) -> dict[str, float]:
    """Clip the gradient of each role by its norm, take one optimiser step and clear the gradients. Returns the norms
    before clipping.

    Raises:
        InputError: a norm is not finite.
    """
    norms = {
        f"{role}_grad_norm": float(torch.nn.utils.clip_grad_norm_(roles.parameters_of(role), max_grad_norm))
        for role in roles.trainable
    }
    for role in roles.trainable:
        if not math.isfinite(norm := norms[f"{role}_grad_norm"]):
            parameters = describe_non_finite(roles.get_named_parameters(role))
            raise InputError(
                "stage.lr",
                optimiser.param_groups[0]["lr"],
                f"{role}_grad_norm is {norm}{parameters}: the run has diverged, and no step was taken",
                "Lower stage.lr, stage.value_lr or stage.max_grad_norm, raise stage.kl_coef, or use dtype=float32.",
            )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norms


def take_gradient_steps(
    roles: Roles,
    optimiser: Optimizer,
    experience: Experience,
    cached: CachedForward | None = None,
    *,
    epochs: int,
    minibatch_count: int,
    max_grad_norm: float,
    generator: torch.Generator,
    max_approx_kl: float | None = None,
    micro_batch: int,
    temperature: float,
    losses: Losses,
) -> dict[str, float]:
    """Run the gradient steps of all epochs and minibatches of one PPO batch, and return the mean metrics.

    A minibatch that teaches nothing is no step: an optimiser with momentum would still move the weights.

    Args:
        cached: forward passes over the whole batch for the first step, if the batch is one minibatch.
        generator: draws the minibatches; on the CPU.
        max_approx_kl: steps end when a minibatch finds the policy this far from the policy before the update.
        micro_batch, temperature, losses: see `accumulate_gradients`.

    Returns:
        means over all minibatches; `first_ratio` and `first_log_ratio` of the first one; and `steps`.
    """
    rows = experience.rollout.tokens_BS.shape[0]
    history: list[dict[str, float]] = []
    steps = 0
    for index in (part for _ in range(epochs) for part in split_minibatches(rows, minibatch_count, generator)):
        part = experience if cached else experience.rows(index)
        figures = accumulate_gradients(
            roles, part, cached, micro_batch=micro_batch, temperature=temperature, losses=losses
        )
        cached = None  # its graphs are used up
        if history and max_approx_kl is not None and figures["approx_kl"] > max_approx_kl:
            optimiser.zero_grad(set_to_none=True)
            break
        if needs_advantages_only(part, losses) and not bool(part.advantages_BT.any()):
            optimiser.zero_grad(set_to_none=True)
            history.append({**figures, "policy_grad_norm": 0.0})
            continue
        steps += 1
        history.append({**figures, **take_gradient_step(roles, optimiser, max_grad_norm)})
    means = {name: sum(figures[name] for figures in history) / len(history) for name in history[0]}
    first = {"first_ratio": history[0]["ratio"], "first_log_ratio": history[0]["log_ratio"]}
    return {**means, **first, "steps": float(steps)}


def require_first_ratio(
    figures: Mapping[str, float], max_difference: float, id: str, model_type: str, dtype: str
) -> None:
    """Raise InputError unless π_new / π_old was close to 1 at every token before the first step of a run, when both are
    one policy.

    The mean ratio would hide deviations to both sides, so the mean |log ratio| is checked.

    Args:
        figures: result of the first `take_gradient_steps` of a run.
        max_difference: nats a token.

    Raises:
        InputError: the ratio is further from 1 than rounding explains.
    """
    off = figures["first_log_ratio"]
    require(
        off <= max_difference,
        "model.path",
        id,
        f"π_new/π_old of its first update lies {off:.2g} nats a token from 1 (mean ratio {figures['first_ratio']:.3f}; "
        f"{dtype} may have {max_difference:g}), so type {model_type} computes different probabilities in different "
        "batches",
        f"Run the same line with stage=verify, which shows what is wrong; stage.first_ratio.{dtype}= is the bound.",
    )


def compute_lr_factor(update: int, updates: int, warmup: float, schedule: str) -> float:
    """Return the factor of the learning rate at an update, counted from 0, by linear warm-up and the schedule.

    It rises over the first `warmup` share of the updates, then stays (`constant`), or falls to nearly 0 along a line
    (`linear`) or half a cosine (`cosine`).
    """
    rising = int(updates * warmup)
    if update < rising:
        return (update + 1) / (rising + 1)
    progress = (update - rising) / (updates - rising)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]
