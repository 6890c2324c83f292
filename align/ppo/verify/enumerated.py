"""Exact expected gradients of policy-gradient estimators, computed by enumerating every batch.

On a problem that is small enough (`closed_form`), a batch of K answers to its one prompt is one of finitely many, each
with a known probability. The mean over all of them of the gradient that training would take is compared with the
gradient of J. The mean gradient of an unbiased estimator is that gradient times a positive number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from align.models.roles import ForwardOutput
from align.ops.losses import compute_loss_divisor
from align.ppo.experience import Estimator, assemble_experience
from align.ppo.update import Losses, compute_policy_loss
from align.ppo.verify.anchors import Anchor
from align.ppo.verify.closed_form import Problem

LONGEST = 2
"""Number of tokens of the longest answer."""
SIZE = 2
"""Number of answers in a batch."""


class Choice(NamedTuple):
    """An advantage estimator with its loss settings.

    Attributes:
        losses: settings of the losses; a `kl_coef` of 1 means the problem's own coefficient.
        unbiased: whether the mean gradient must be that of J.
    """

    estimator: Estimator
    losses: Losses
    unbiased: bool = False


def list_choices(size: int) -> dict[str, Choice]:
    """Return the advantage estimators with loss settings whose bias is measured, by the names that are printed.

    Args:
        size: answers of a batch, which is one group.
    """
    rloo = Estimator("rloo", size)
    grpo = Estimator("grpo", size)
    constant = Losses(loss_mean="constant", longest=LONGEST)
    return {
        "rloo, constant": Choice(rloo, constant, unbiased=True),
        "grpo without spread, constant": Choice(grpo._replace(scale="none"), constant, unbiased=True),
        "rloo, token": Choice(rloo, Losses()),
        "rloo, sequence": Choice(rloo, Losses(loss_mean="sequence")),
        "grpo, constant": Choice(grpo, constant),
        "grpo, token": Choice(grpo, Losses()),
        "grpo, sequence": Choice(grpo, Losses(loss_mean="sequence")),
        "reinforce_pp, token": Choice(Estimator("reinforce_pp"), Losses()),
        "rloo, constant, kl_in=loss by k2": Choice(rloo, constant._replace(kl_coef=1.0, kl_estimator="k2")),
        "rloo, constant, kl_in=loss by k3": Choice(rloo, constant._replace(kl_coef=1.0, kl_estimator="k3")),
    }


class Bias(NamedTuple):
    """The difference between an estimator's mean gradient and the exact gradient of J, as an angle and a scale.

    Attributes:
        angle: between the two, in degrees. No learning rate makes up for it.
        scale: the mean gradient's component along the gradient of J, relative to that gradient.
    """

    angle: float
    scale: float


def make_problem() -> Problem:
    """Return an enumerable problem with three tokens and seven answers, of one or two tokens each."""
    return Problem(vocabulary=3, length=LONGEST, beta=0.3)


def compute_mean_gradient(problem: Problem, table: Tensor, choice: Choice, size: int) -> Tensor:
    """Return the expected gradient that an estimator ascends [prefixes, vocabulary], over all batches of `size` answers
    weighted by their probability.

    Args:
        table: logits of the policy.
    """
    batches = torch.combinations(torch.arange(len(problem.tokens)), size, with_replacement=True)
    probability = problem.logprobs(table.double()).sum(1).exp()
    policy = table.clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.double)
    losses = choice.losses._replace(kl_coef=problem.beta * choice.losses.kl_coef)
    for rows in batches:
        rollout = problem.rollout(rows)
        mask = rollout.response_mask_BT
        width = mask.shape[1]
        logprobs = problem.logprobs(policy)[rows][:, :width]
        ref_logprobs = problem.logprobs(problem.reference)[rows][:, :width]
        experience, _ = assemble_experience(
            rollout,
            problem.reward[rows],
            logprobs.detach(),
            ref_logprobs,
            estimator=choice.estimator,
            kl_coef=problem.beta,
            kl_estimator="k1",
            kl_in_reward=not losses.kl_coef,
        )
        output = ForwardOutput(logprobs, torch.zeros_like(ref_logprobs), torch.empty(0))
        divisor = compute_loss_divisor(mask, losses.loss_mean, losses.longest)
        loss = compute_policy_loss(output, experience, divisor, losses).loss
        total = total - count_orders(rows) * probability[rows].prod() * loss.double()
    return torch.autograd.grad(total, policy)[0].double()


def count_orders(rows: Tensor) -> int:
    """Return the number of distinct orders in which the answers of a batch can be drawn."""
    repeats = torch.unique(rows, return_counts=True)[1].tolist()
    return math.factorial(len(rows)) // math.prod(map(math.factorial, repeats))


def measure_bias(problem: Problem, table: Tensor, choice: Choice, size: int) -> Bias:
    """Return the angle and scale between an estimator's mean gradient and the gradient of J, at the policy with logits
    `table`."""
    policy = table.clone().requires_grad_(True)
    exact = torch.autograd.grad(problem.compute_expected_reward_less_kl(policy), policy)[0].double().flatten()
    mean = compute_mean_gradient(problem, table, choice, size).flatten()
    along = float(mean @ exact / (exact @ exact))
    aside = float((mean - along * exact).norm() / exact.norm())
    return Bias(math.degrees(math.atan2(aside, along)), along)


def measure_biases(size: int = SIZE) -> dict[str, Bias]:
    """Return the gradient bias of each estimator by its name, at one policy that differs from the reference, so that KL
    has a gradient."""
    problem = make_problem()
    g = torch.Generator().manual_seed(2)
    table = problem.reference + torch.randn(problem.reference.shape, generator=g)
    return {name: measure_bias(problem, table, choice, size) for name, choice in list_choices(size).items()}


def check_unbiased(biases: dict[str, Bias], size: int = SIZE) -> Iterator[Anchor]:
    """Yield a check result for each estimator that must be unbiased, with the angle between its mean gradient and that
    of J.

    Args:
        biases: result of `measure_biases`.
    """
    for name, choice in list_choices(size).items():
        if choice.unbiased:
            off = biases[name].angle if biases[name].scale > 0 else math.inf
            label = f"{choice.estimator.name} unbiased"
            yield Anchor(label, f"{name}: the mean gradient over every batch is that of J (degrees)", off, 1e-2)
