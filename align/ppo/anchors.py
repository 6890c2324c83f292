"""Facts that hold of a correct PPO whatever the model, measured on the code that trains.

Each anchor compares what a run computes with something known from elsewhere: a definition written out, an optimum in
closed form, an identity that the first step must satisfy, or the same figure on another route. `stage=verify` shows
them on the user's own base; the tests break the code and see which one notices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.models.chunks import several_in_chunks
from align.models.roles import Roles
from align.models.trunk import base_model
from align.ops.gae import gae, token_rewards
from align.ops.kl import kl_k1
from align.ops.losses import value_loss
from align.ppo.closed_form import Problem, solved
from align.ppo.experience import Experience, experience
from align.ppo.update import accumulate, step
from align.types import Rollout


@dataclass(frozen=True, slots=True)
class Anchor:
    """One fact and how well it holds.

    Attributes:
        name: a word or two.
        claim: what must be true.
        measured: how far it is from true.
        tolerance: how far it may be.
    """

    name: str
    claim: str
    measured: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.tolerance  # of NaN this is False


@dataclass(frozen=True)
class Setting:
    """The user's own model in its roles, and a batch that its policy sampled.

    Attributes:
        loose: True where it computes in less than fp32: identities then hold to its rounding alone.
    """

    roles: Roles
    rollout: Rollout
    temperature: float
    micro_batch: int
    loose: bool

    def experience(self) -> Experience:
        """The batch as the learner reads it, under scores drawn at random."""
        estimates = partial(self.roles.estimates, temperature=self.temperature)
        scores = torch.randn(len(self.rollout.ended_B), generator=torch.Generator().manual_seed(0))
        return experience(
            self.rollout, scores.to(self.rollout.tokens_BS.device),
            *several_in_chunks(estimates, self.rollout, self.micro_batch),
            kl_coef=0.1, kl_estimator="k1", kl_in_reward=True, gamma=1.0, lam=0.95, whiten_rewards=False,
            bootstrap_truncated=False,
        )[0]  # fmt: skip

    def gradients(self, made: Experience, micro_batch: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What one minibatch adds to each role, as one vector a role; and its figures. Nothing is left behind."""
        figures = accumulate(
            self.roles, made, micro_batch=micro_batch, temperature=self.temperature, clip_range=0.2,
            value_clip_range=None, kl_loss_coef=0.0, kl_estimator="k1",
        )  # fmt: skip
        return {role: taken(self.roles, role) for role in ("policy", "value")}, figures


def taken(roles: Roles, role: str) -> Tensor:
    """A role's gradient as one vector; it is cleared."""
    parameters = roles.parameters_of(role)
    vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return vector


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN where nothing was expected, which no tolerance admits."""
    return float((found - expected).norm() / expected.norm()) if expected.norm() > 0 else math.nan


# Maths alone, in fp64.


def ragged(rows: int = 6, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Random rewards and values [B, T] with garbage outside a mask that has every length."""
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(width) < (torch.arange(rows) % width + 1)[:, None]
    rewards, values = torch.randn(2, rows, width, generator=g, dtype=torch.double)
    return torch.where(mask, rewards, 1e3), torch.where(mask, values, -1e3), mask


def advantages_by_definition() -> Anchor:
    """GAE against its sum, written out: A_t = Σ_k (γλ)^k (r_{t+k} + γ V_{t+k+1} − V_{t+k})."""
    rewards, values, mask = ragged()
    gamma, lam, worst = 0.9, 0.8, 0.0
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(mask.sum(1).tolist()):
        after = [*values[b, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum(
                (gamma * lam) ** (k - t) * (float(rewards[b, k]) + gamma * after[k + 1] - after[k])
                for k in range(t, length)
            )
            worst = max(worst, abs(float(advantages[b, t]) - expected))
            worst = max(worst, abs(float(returns[b, t]) - expected - after[t]))
    worst = max(worst, float((advantages * ~mask).abs().max()))
    return Anchor("gae", "advantages and returns are the sums that define them, 0 behind the end", worst, 1e-9)


def rewards_by_hand() -> Anchor:
    """Two responses by hand: KL is a cost, the score is paid once, at the last token."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    policy = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -1.0, -3.0]], dtype=torch.double)
    reference = torch.tensor([[-1.5, -1.0, 7.0], [-0.5, -2.0, -1.0]], dtype=torch.double)
    found = token_rewards(torch.tensor([2.0, -1.0]), kl_k1(policy, reference), mask, 0.1)
    expected = torch.tensor([[-0.05, 2.1, 0.0], [0.0, -0.1, -0.8]], dtype=torch.double)
    off = float((found - expected).abs().max())
    return Anchor("rewards", "−kl_coef·KL at each token, the score at the last", off, 1e-6)


def closed_form() -> Anchor:
    """Every sequence of up to two tokens, and an optimum that is known."""
    problem = Problem(vocabulary=6, length=2, beta=0.5)
    off = abs(problem.optimum() - solved(problem).reached)
    return Anchor("closed form", "PPO reaches the known optimum J* of an enumerable problem", off, 1e-3)


# The user's own model.


def first_ratio(setting: Setting) -> Anchor:
    """Before the first step the policy is the one that sampled."""
    made = setting.experience()
    _, figures = setting.gradients(made, setting.micro_batch)
    off = max(abs(figures["ratio"] - 1), abs(figures["approx_kl"]), figures["clip_fraction"])
    tolerance = 0.02 if setting.loose else 1e-5
    return Anchor("first ratio", "π/π_old is 1 before the first step, nothing is clipped", off, tolerance)


def first_gradient(setting: Setting) -> Anchor:
    """Before the first step PPO's gradient is REINFORCE's with a baseline, −Σ A ∇ log π / n; taken here from plain
    logits of one row at a time without padding, so that a wrong mask, position, shift or temperature shows."""
    roles, rollout, made = setting.roles, setting.rollout, setting.experience()
    found = setting.gradients(made, setting.micro_batch)[0]["policy"]
    count = float(rollout.response_mask_BT.sum())
    for b in range(len(rollout.ended_B)):
        ids = rollout.tokens_BS[b][rollout.mask_BS[b]][None]
        length = int(rollout.response_mask_BT[b].sum())
        with roles.use("policy", train=True) as model, torch.enable_grad():
            logits = base_model(model)(input_ids=ids).logits[0, -length - 1 : -1].float()
            log_p = (logits / setting.temperature).log_softmax(-1).gather(-1, ids[0, -length:, None]).squeeze(-1)
            (-(made.advantages_BT[b, :length] * log_p).sum() / count).backward()
    expected = taken(roles, "policy")
    return Anchor(
        "first gradient", "the policy's first gradient is REINFORCE's with a baseline", relative(found, expected),
        0.2 if setting.loose else 1e-4,
    )  # fmt: skip


def invariance(setting: Setting) -> Anchor:
    """The gradient does not depend on how a minibatch is cut, padded or ordered."""
    made = setting.experience()
    whole = setting.gradients(made, setting.micro_batch)[0]
    rows = len(setting.rollout.ended_B)
    other = setting.gradients(made.rows(torch.arange(rows - 1, -1, -1)), 1)[0]  # alone, no row has any padding
    worst = max(relative(other[role], whole[role]) for role in whole if whole[role].norm() > 0)
    return Anchor(
        "invariance", "micro-batch, padding and order of rows change no gradient", worst, 0.2 if setting.loose else 1e-5
    )


def isolation(setting: Setting) -> Anchor:
    """The value loss reaches no weight of the policy, and two steps of both leave the reference as it was."""
    roles, rollout = setting.roles, setting.rollout
    mask = rollout.response_mask_BT
    read = roles.logprobs("policy", rollout, setting.temperature, train=True)
    values = roles.values(rollout, train=True, policy_states_BTD=read.states_BTD)
    value_loss(values, values.detach(), torch.ones_like(values), mask, float(mask.sum())).loss.backward()
    leaked = float(taken(roles, "policy").abs().sum())
    moved = taken(roles, "value").norm() == 0  # then the value loss reached nothing at all
    before = roles.logprobs("reference", rollout, setting.temperature).logprobs_BT
    kept = [p.detach().clone() for p in all_parameters(roles)]
    optimiser = torch.optim.AdamW(all_parameters(roles), lr=1e-3)
    made = setting.experience()
    for _ in range(2):
        accumulate(
            roles, made, micro_batch=setting.micro_batch, temperature=setting.temperature, clip_range=0.2,
            value_clip_range=None, kl_loss_coef=0.0, kl_estimator="k1",
        )  # fmt: skip
        step(roles, optimiser, 1.0)
    after = roles.logprobs("reference", rollout, setting.temperature).logprobs_BT
    put_back(roles, kept)
    off = leaked + float((before - after).abs().max()) + float(moved)
    return Anchor("isolation", "the value loss reaches no policy weight, the reference never moves", off, 0.0)


def sampling(setting: Setting, draw: Callable[[], Rollout]) -> Anchor:
    """Samples come from the distribution whose logprobs are used: over many tokens the mean of −log π is the mean
    entropy. A hidden top-k, top-p, penalty or another temperature makes them likelier than that.

    Args:
        draw: one more batch of the policy's.
    """
    gaps: list[Tensor] = []
    for _ in range(4):
        rollout = draw()
        read, mask = setting.roles.logprobs("policy", rollout, setting.temperature), rollout.response_mask_BT
        gaps.append((-read.logprobs_BT - read.entropy_BT)[mask])
    gap = torch.cat(gaps).double()
    z = float(gap.mean().abs() / (gap.std() / math.sqrt(len(gap))))
    return Anchor("sampling", "samples come from the π whose logprobs are used (standard errors)", z, 4.5)


def all_parameters(roles: Roles) -> list[Any]:
    return [*roles.parameters_of("policy"), *roles.parameters_of("value")]


@torch.no_grad()
def put_back(roles: Roles, kept: Sequence[Tensor]) -> None:
    for parameter, value in zip(all_parameters(roles), kept, strict=True):
        parameter.copy_(value)


def maths() -> Iterator[Anchor]:
    """The anchors that need no model."""
    yield advantages_by_definition()
    yield rewards_by_hand()
    yield closed_form()


def on_model(setting: Setting, draw: Callable[[], Rollout]) -> Iterator[Anchor]:
    """The anchors on the user's own model."""
    yield first_ratio(setting)
    yield first_gradient(setting)
    yield invariance(setting)
    yield isolation(setting)
    yield sampling(setting, draw)
