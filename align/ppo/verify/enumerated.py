"""What the gradient of an estimator is on average, exactly: by every batch that could be drawn.

On a problem that is small enough (`closed_form`), a batch of K answers to its one prompt is one of finitely many, each
with a known chance. The mean of the gradients of all of them, which the functions that train give, is compared with the
gradient of J, which is known in closed form. An unbiased estimator has that gradient times a positive number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from align.models.roles import ForwardOutput
from align.ops.losses import loss_divisor
from align.ppo.advantages import Estimator
from align.ppo.experience import experience
from align.ppo.update import Losses, policy_part
from align.ppo.verify.anchors import Anchor
from align.ppo.verify.closed_form import Problem

LONGEST, SIZE = 2, 2
"""Tokens of an answer; and answers of a batch."""


class Choice(NamedTuple):
    """An estimator and what is minimised, of which `kl_coef` of 1 stands for the problem's own price; and whether its
    mean gradient is that of J."""

    estimator: Estimator
    losses: Losses
    unbiased: bool = False


def choices(size: int) -> dict[str, Choice]:
    """What is called how.

    Args:
        size: answers of a batch, which is one group.
    """
    rloo, grpo, whole = Estimator("rloo", size), Estimator("grpo", size), Losses(loss_mean="constant", longest=LONGEST)
    return {
        "rloo, constant": Choice(rloo, whole, unbiased=True),
        "grpo without spread, constant": Choice(grpo._replace(scale="none"), whole, unbiased=True),
        "rloo, token": Choice(rloo, Losses()),
        "rloo, sequence": Choice(rloo, Losses(loss_mean="sequence")),
        "grpo, constant": Choice(grpo, whole),
        "grpo, token": Choice(grpo, Losses()),
        "grpo, sequence": Choice(grpo, Losses(loss_mean="sequence")),
        "reinforce_pp, token": Choice(Estimator("reinforce_pp"), Losses()),
        "rloo, constant, kl_in=loss by k2": Choice(rloo, whole._replace(kl_coef=1.0, kl_estimator="k2")),
        "rloo, constant, kl_in=loss by k3": Choice(rloo, whole._replace(kl_coef=1.0, kl_estimator="k3")),
    }


class Bias(NamedTuple):
    """How the mean gradient differs from that of J.

    Attributes:
        angle: between the two, in degrees: the direction is wrong by so much, whatever the learning rate.
        scale: its length along the gradient of J, as a multiple of it.
    """

    angle: float
    scale: float


def problem() -> Problem:
    """Three tokens, answers of one or two: seven of them."""
    return Problem(vocabulary=3, length=LONGEST, beta=0.3)


def mean_gradient(problem: Problem, table: Tensor, choice: Choice, size: int) -> Tensor:
    """The gradient that is ascended, on average over all batches of `size` answers [prefixes, vocabulary], by the very
    functions that train.

    Args:
        table: logits of the policy.
    """
    batches = torch.combinations(torch.arange(len(problem.tokens)), size, with_replacement=True)
    chance = problem.logprobs(table.double()).sum(1).exp()
    policy, total = table.clone().requires_grad_(True), torch.zeros((), dtype=torch.double)
    losses = choice.losses._replace(kl_coef=problem.beta * choice.losses.kl_coef)
    for rows in batches:
        rollout, logprobs = problem.rollout(rows), problem.logprobs(policy)[rows]
        mask, reference = rollout.response_mask_BT, problem.logprobs(problem.reference)[rows]
        logprobs, reference = logprobs[:, : mask.shape[1]], reference[:, : mask.shape[1]]
        made, _ = experience(
            rollout, problem.reward[rows], logprobs.detach(), reference, estimator=choice.estimator,
            kl_coef=problem.beta, kl_estimator="k1", kl_in_reward=not losses.kl_coef,
        )  # fmt: skip
        output = ForwardOutput(logprobs, torch.zeros_like(reference), torch.empty(0))
        loss = policy_part(output, made, loss_divisor(mask, losses.loss_mean, losses.longest), losses).loss
        total = total - orders(rows) * chance[rows].prod() * loss.double()
    return torch.autograd.grad(total, policy)[0].double()


def orders(rows: Tensor) -> int:
    """In how many orders these answers can be drawn."""
    repeats = torch.unique(rows, return_counts=True)[1].tolist()
    return math.factorial(len(rows)) // math.prod(map(math.factorial, repeats))


def bias_of(problem: Problem, table: Tensor, choice: Choice, size: int) -> Bias:
    """Of a choice, where the policy's logits are `table`."""
    policy = table.clone().requires_grad_(True)
    exact = torch.autograd.grad(problem.objective(policy), policy)[0].double().flatten()
    found = mean_gradient(problem, table, choice, size).flatten()
    along = float(found @ exact / (exact @ exact))
    aside = float((found - along * exact).norm() / exact.norm())
    return Bias(math.degrees(math.atan2(aside, along)), along)


def biases(size: int = SIZE) -> dict[str, Bias]:
    """Of every choice, at one policy that stands elsewhere than the reference, so that KL has a gradient too."""
    found, g = problem(), torch.Generator().manual_seed(2)
    table = found.reference + torch.randn(found.reference.shape, generator=g)
    return {name: bias_of(found, table, choice, size) for name, choice in choices(size).items()}


def unbiased(found: dict[str, Bias], size: int = SIZE) -> Iterator[Anchor]:
    """Those that should be unbiased, are: the angle is 0."""
    for name, choice in choices(size).items():
        if choice.unbiased:
            off = found[name].angle if found[name].scale > 0 else math.inf
            called = f"{choice.estimator.name} unbiased"
            yield Anchor(called, f"{name}: the mean gradient over every batch is J's (degrees)", off, 1e-2)
