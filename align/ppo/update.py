"""The gradient steps of PPO on one batch of experience."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from align import ranks
from align.core.errors import InputError, require
from align.models.chunks import by_length
from align.models.finite import where
from align.models.roles import CachedForward, ForwardOutput, Roles
from align.ops.kl import ESTIMATORS
from align.ops.losses import Loss, kl_loss, loss_divisor, loss_weights, policy_loss, value_loss
from align.ops.masking import masked_sum
from align.ppo.experience import Experience


def minibatches(rows: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """A random division of `rows` rows into `count` equal parts."""
    return list(torch.randperm(rows, generator=generator).split(rows // count))


class Losses(NamedTuple):
    """What is minimised.

    Attributes:
        clip_range, clip_range_high, importance_sampling_level: of `policy_loss`.
        loss_mean, longest: see `loss_divisor`.
        value_clip_range: of `value_loss`.
        kl_coef, kl_estimator: of `kl_loss`; at 0 the loss has no such term.
    """

    clip_range: float = 0.2
    clip_range_high: float | None = None
    importance_sampling_level: str = "token"
    loss_mean: str = "token"
    longest: int = 0
    value_clip_range: float | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k1"


def accumulate(
    roles: Roles,
    minibatch: Experience,
    cached: CachedForward | None = None,
    *,
    micro_batch: int,
    temperature: float,
    losses: Losses,
) -> dict[str, float]:
    """Add the gradient of one minibatch to what trains, a micro-batch at a time.

    Each loss is a sum over tokens divided by a number of the *whole* minibatch, so that neither the size of the
    micro-batches nor the padding in them changes the gradient. Rows that nothing is learned from are read for the
    figures, without a backward pass.

    Args:
        cached: a pass over exactly this minibatch, in this order of rows; else one is made a micro-batch.

    Each rank adds its share of the micro-batches; the gradient and the figures are those of all ranks.

    Returns:
        token means over the minibatch.
    """
    whole = minibatch.rollout.response_mask_BT
    divisor, count = loss_divisor(whole, losses.loss_mean, losses.longest), float(whole.sum())
    divided = not cached and by_advantages_alone(minibatch, losses)
    shares = minibatch.divided() if divided else [(minibatch, True)]
    chunks = [(share, rows, learns) for share, learns in shares for rows in by_length(share.rollout, micro_batch)]
    parts = ((share.rows(rows), learns) for share, rows, learns in ranks.dealt(chunks))
    found = []
    for part, learns in [(minibatch, True)] if cached else parts:
        output = cached.output if cached else roles.logprobs("policy", part.rollout, temperature, train=learns)
        policy = policy_part(output, part, divisor, losses)
        if learns:
            roles.trains("policy")
            policy.loss.backward()
        sums = {**policy.sums, "entropy": masked_sum(output.entropy_BT, part.rollout.response_mask_BT)}
        if part.values_BT is not None and part.returns_BT is not None:
            values = cached.values_BT if cached else None
            if values is None:
                values = roles.values(part.rollout, True, policy_states_BTD=output.states_BTD)
            old, returns, mask = part.values_BT, part.returns_BT, part.rollout.response_mask_BT
            value = value_loss(values, old, returns, mask, count, losses.value_clip_range)
            roles.trains("value")
            value.loss.backward()
            sums |= value.sums
        found.append(sums)
    ranks.sum_gradients(p for role in roles.trainable for p in roles.parameters_of(role))
    figures = summed(found, len(chunks))
    loss = figures.pop("policy_loss") / divisor
    return {**{name: total / count for name, total in figures.items()}, "policy_loss": loss}


def by_advantages_alone(minibatch: Experience, losses: Losses) -> bool:
    """Whether a row without an advantage teaches nothing: no critic learns, and no price of KL is in the loss."""
    return minibatch.values_BT is None and not losses.kl_coef


def policy_part(output: ForwardOutput, part: Experience, divisor: float, losses: Losses) -> Loss:
    """The policy's loss on a micro-batch, the price of KL in it; among its sums the surrogate's, as `policy_loss`."""
    mask, logprobs = part.rollout.response_mask_BT, output.logprobs_BT
    of_rows, weights = loss_weights(mask, losses.loss_mean), part.weights_BT
    if of_rows is not None:
        weights = of_rows if weights is None else weights * of_rows
    policy = policy_loss(
        logprobs, part.old_logprobs_BT, part.advantages_BT, mask, losses.clip_range, divisor, weights,
        losses.clip_range_high, losses.importance_sampling_level,
    )  # fmt: skip
    loss = policy.loss
    if losses.kl_coef:
        kl_BT = ESTIMATORS[losses.kl_estimator](logprobs, part.ref_logprobs_BT)
        loss = loss + losses.kl_coef * kl_loss(kl_BT, mask, divisor, of_rows)
    return Loss(loss, {**policy.sums, "policy_loss": policy.loss.detach().double() * divisor})


def summed(found: Sequence[Mapping[str, Tensor]], chunks: int) -> dict[str, float]:
    """Σ over the micro-batches of all ranks.

    Args:
        found: figure → its sum over a micro-batch, of this rank's.
        chunks: micro-batches of all ranks.
    """
    mine = []
    if found:  # a rank may have no share
        names = list(found[0])
        sums = torch.stack([torch.stack([each[name].double() for name in names]) for each in found])
        mine = [dict(zip(names, row, strict=True)) for row in sums.tolist()]  # one message from the device for all
    rows = ranks.gathered(mine, chunks)
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def gradient_step(roles: Roles, optimiser: Optimizer, max_grad_norm: float) -> dict[str, float]:
    """Clip each role's gradient by its own norm, take one optimiser step, clear the gradients."""
    norms = {
        f"{role}_grad_norm": float(torch.nn.utils.clip_grad_norm_(roles.parameters_of(role), max_grad_norm))
        for role in roles.trainable
    }
    for role in roles.trainable:
        if not math.isfinite(norm := norms[f"{role}_grad_norm"]):
            found = where(roles.named_parameters_of(role))
            raise InputError(
                "stage.lr", optimiser.param_groups[0]["lr"],
                f"{role}_grad_norm is {norm}{found}: the run has diverged, and no step was taken",
                "Lower stage.lr, stage.value_lr or stage.max_grad_norm, raise stage.kl_coef, or use dtype=float32.",
            )  # fmt: skip
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norms


def update(
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
    """Every epoch and minibatch over one batch; the figures are means over all minibatches, those of the first ratio
    apart. A minibatch that nothing is learned from is no step: an optimiser with momentum would move all the same.

    Args:
        cached: a pass over the whole batch, for the first step, where that is one minibatch.
        generator: draws the minibatches; on the CPU.
        max_approx_kl: no further step is taken once a minibatch finds the policy this far from the one that sampled.
        micro_batch, temperature, losses: see `accumulate`.
    """
    rows = experience.rollout.tokens_BS.shape[0]
    seen: list[dict[str, float]] = []
    steps = 0
    for index in (part for _ in range(epochs) for part in minibatches(rows, minibatch_count, generator)):
        part, passed = (experience.rows(index), None) if seen or not cached else (experience, cached)
        figures = accumulate(roles, part, passed, micro_batch=micro_batch, temperature=temperature, losses=losses)
        if seen and max_approx_kl is not None and figures["approx_kl"] > max_approx_kl:
            optimiser.zero_grad(set_to_none=True)
            break
        if by_advantages_alone(part, losses) and not bool(part.advantages_BT.any()):
            optimiser.zero_grad(set_to_none=True)
            seen.append({**figures, "policy_grad_norm": 0.0})
            continue
        steps += 1
        seen.append({**figures, **gradient_step(roles, optimiser, max_grad_norm)})
    means = {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]}
    first = {"first_ratio": seen[0]["ratio"], "first_log_ratio": seen[0]["log_ratio"]}
    return {**means, **first, "steps": float(steps)}


def check_first_ratio(figures: Mapping[str, float], bound: float, id: str, model_type: str, dtype: str) -> None:
    """Before the first step π_new is π_old, and their ratio 1 at every token.

    The mean ratio alone would hide deviations on either side of it, so the mean |log ratio| is bounded.

    Args:
        figures: of the first `update` of a run.
        bound: nats.

    Raises:
        InputError: the ratio is further off than rounding takes it.
    """
    off = figures["first_log_ratio"]
    require(
        off <= bound, "model.path", id,
        f"π_new/π_old of its first update lies {off:.2g} nats a token from 1 (mean ratio {figures['first_ratio']:.3f}; "
        f"{dtype} may have {bound:g}), so type {model_type} is another policy in another batch",
        f"Run the same line with stage=verify, which says what is wrong; stage.first_ratio.{dtype}= is the bound.",
    )  # fmt: skip


def lr_factor(update: int, updates: int, warmup: float, schedule: str) -> float:
    """Return the factor of the learning rate at update number `update` (from 0).

    It rises over the first `warmup` share of the updates, then stays (`constant`), or falls to nearly 0 along a line
    (`linear`) or half a cosine (`cosine`).
    """
    rising = int(updates * warmup)
    if update < rising:
        return (update + 1) / (rising + 1)
    progress = (update - rising) / (updates - rising)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]
