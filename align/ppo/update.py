"""The gradient steps of PPO on one batch of experience."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from align import ranks
from align.errors import InputError, require
from align.models.chunks import by_length
from align.models.finite import where
from align.models.roles import TRAINABLE, CachedForward, Roles
from align.ops.kl import ESTIMATORS
from align.ops.losses import kl_loss, policy_loss, value_loss
from align.ops.masking import masked_sum
from align.ppo.experience import Experience


def minibatches(rows: int, count: int, generator: torch.Generator) -> list[Tensor]:
    """A random division of `rows` rows into `count` equal parts."""
    return list(torch.randperm(rows, generator=generator).split(rows // count))


def accumulate(
    roles: Roles,
    minibatch: Experience,
    cached: CachedForward | None = None,
    *,
    micro_batch: int,
    temperature: float,
    clip_range: float,
    value_clip_range: float | None,
    kl_loss_coef: float,
    kl_estimator: str,
) -> dict[str, float]:
    """Add the gradient of one minibatch to policy and value, a micro-batch at a time.

    Each loss is a sum over tokens divided by the tokens of the *whole* minibatch, so that neither the size of the
    micro-batches nor the padding in them changes the gradient.

    Args:
        cached: a pass over exactly this minibatch, in this order of rows; else one is made a micro-batch.

    Each rank adds its share of the micro-batches; the gradient and the figures are those of all ranks.

    Returns:
        token means over the minibatch.
    """
    count = float(minibatch.rollout.response_mask_BT.sum())
    indices = list(by_length(minibatch.rollout, micro_batch))
    parts = [minibatch] if cached else map(minibatch.rows, ranks.dealt(indices))
    found = []
    for part in parts:
        mask = part.rollout.response_mask_BT
        output = cached.output if cached else roles.logprobs("policy", part.rollout, temperature, train=True)
        logprobs = output.logprobs_BT
        policy = policy_loss(
            logprobs, part.old_logprobs_BT, part.advantages_BT, mask, clip_range, count, part.weights_BT
        )
        loss = policy.loss
        if kl_loss_coef:
            kl_BT = ESTIMATORS[kl_estimator](logprobs, part.ref_logprobs_BT)
            loss = loss + kl_loss_coef * kl_loss(kl_BT, mask, count)
        roles.trains("policy")
        loss.backward()
        values = cached.values_BT if cached else roles.values(part.rollout, True, policy_states_BTD=output.states_BTD)
        value = value_loss(values, part.values_BT, part.returns_BT, mask, count, value_clip_range)
        roles.trains("value")
        value.loss.backward()
        sums = {**policy.sums, **value.sums, "entropy": masked_sum(output.entropy_BT, mask)}
        found.append({**sums, "policy_loss": policy.loss.detach().double() * count})
    ranks.sum_gradients(p for role in TRAINABLE for p in roles.parameters_of(role))
    return summed(found, len(indices), count)


def summed(found: Sequence[Mapping[str, Tensor]], chunks: int, count: float) -> dict[str, float]:
    """Σ over the micro-batches of all ranks, divided by `count`.

    Args:
        found: figure → its sum over the tokens of a micro-batch, of this rank's.
        chunks: micro-batches of all ranks.
    """
    mine = []
    if found:  # a rank may have no share
        names = list(found[0])
        sums = torch.stack([torch.stack([each[name].double() for name in names]) for each in found])
        mine = [dict(zip(names, row, strict=True)) for row in sums.tolist()]  # one message from the device for all
    rows = ranks.gathered(mine, chunks)
    return {name: sum(row[name] for row in rows) / count for name in rows[0]}


def gradient_step(roles: Roles, optimiser: Optimizer, max_grad_norm: float) -> dict[str, float]:
    """Clip each role's gradient by its own norm, take one optimiser step, clear the gradients."""
    norms = {
        f"{role}_grad_norm": float(torch.nn.utils.clip_grad_norm_(roles.parameters_of(role), max_grad_norm))
        for role in ("policy", "value")
    }
    for role in ("policy", "value"):
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
    **loss: float | int | str | None,
) -> dict[str, float]:
    """Every epoch and minibatch over one batch; the figures are means over all steps, those of the first ratio apart.

    Args:
        cached: a pass over the whole batch, for the first step, where that is one minibatch.
        generator: draws the minibatches; on the CPU.
        max_approx_kl: no further step is taken once a minibatch finds the policy this far from the one that sampled.
        loss: what `accumulate` takes.
    """
    rows = experience.rollout.tokens_BS.shape[0]
    seen: list[dict[str, float]] = []
    for index in (part for _ in range(epochs) for part in minibatches(rows, minibatch_count, generator)):
        part, passed = (experience.rows(index), None) if seen or not cached else (experience, cached)
        figures = accumulate(roles, part, passed, **loss)  # pyright: ignore[reportArgumentType]
        if seen and max_approx_kl is not None and figures["approx_kl"] > max_approx_kl:
            optimiser.zero_grad(set_to_none=True)
            break
        seen.append({**figures, **gradient_step(roles, optimiser, max_grad_norm)})
    means = {name: sum(s[name] for s in seen) / len(seen) for name in seen[0]}
    first = {"first_ratio": seen[0]["ratio"], "first_log_ratio": seen[0]["log_ratio"]}
    return {**means, **first, "steps": float(len(seen))}


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
