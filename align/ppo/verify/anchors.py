"""Facts that hold of a correct PPO whatever the model: the maths alone, in numbers that are known.

Each anchor compares what a run computes with something known from elsewhere: a definition written out, numbers worked
out by hand, an optimum in closed form. `on_model.py` has those on the user's own base. `stage=verify` shows them all;
the tests break the code and see which one notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from align.core.types import Rollout
from align.ops.gae import gae, token_rewards
from align.ops.kl import kl_k1
from align.ops.losses import policy_loss, value_loss
from align.ops.moments import Moments
from align.ppo.advantages import Estimator
from align.ppo.experience import shaped_scores
from align.ppo.update import Losses
from align.ppo.verify.closed_form import Problem, solved


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


def maths() -> Iterator[Anchor]:
    """The anchors that need no model."""
    yield advantages_by_definition()
    yield rewards_by_hand()
    yield scores_by_hand()
    yield losses_by_hand()
    yield closed_form()
    yield closed_form_without_critic()


def farthest(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest difference between any two tensors of the same shape."""
    return max(float((found - expected).abs().max()) for found, expected in pairs)


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
    off = farthest((found, expected))
    return Anchor("rewards", "−kl_coef·KL at each token, the score at the last", off, 1e-6)


def scores_by_hand() -> Anchor:
    """Raw scores of mean 1 and deviation 2: standardised, clipped to ± 1.5, scaled, a penalty for what was cut."""
    tokens = torch.ones(3, 2, dtype=torch.long)
    cut = Rollout(tokens, tokens.bool(), 1, torch.tensor([True, False, True]))
    raw, moments = torch.tensor([2.0, -1.0, 9.0], dtype=torch.double), Moments(4, 1.0, 16.0)
    found = shaped_scores(raw, cut, moments, score_scale=0.4, score_clip=1.5, missing_eos_penalty=0.3)
    off = farthest((found, torch.tensor([0.2, -0.7, 0.6], dtype=torch.double)))
    return Anchor("scores", "(raw − mean) / std, clipped, scaled, less a penalty for no end", off, 1e-9)


def losses_by_hand() -> Anchor:
    """Ratios of 1.5 and 0.5 under gains and losses, of which two are clipped; values that ran away, of which one is."""
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    ratio, gain = torch.tensor([[[1.5, 0.5, 1.5, 0.5]], [[1.0, -1.0, -1.0, 1.0]]], dtype=torch.double)
    policy = policy_loss(ratio.log(), torch.zeros_like(ratio), gain, everywhere, 0.2, 4.0).loss
    values, old, returns = torch.tensor([[[2.0, 0.9]], [[1.0, 1.0]], [[3.0, 0.0]]], dtype=torch.double)
    value = value_loss(values, old, returns, everywhere[:, :2], 2.0, 0.2).loss
    expected = torch.tensor([-(1.2 - 0.8 - 1.5 + 0.5) / 4, (1.8**2 + 0.9**2) / 4], dtype=torch.double)
    off = farthest((torch.stack([policy, value]), expected))
    return Anchor("losses", "the smaller surrogate of two, the larger value error of two", off, 1e-9)


def closed_form() -> Anchor:
    """Every sequence of up to two tokens, and an optimum that is known; reached by the learner itself."""
    problem = Problem(vocabulary=6, length=2, beta=0.5)
    off = abs(problem.optimum() - solved(problem).reached)
    return Anchor("closed form", "PPO reaches the known optimum J* of an enumerable problem", off, 1e-3)


def closed_form_without_critic() -> Anchor:
    """The same by groups of answers, of which each is compared with the others."""
    problem = Problem(vocabulary=6, length=2, beta=0.5)
    rloo, whole = Estimator("rloo", 8), Losses(loss_mean="constant", longest=2)
    off = abs(problem.optimum() - solved(problem, rloo, whole).reached)
    return Anchor("no critic", "so does RLOO", off, 1e-3)
