"""Checks of PPO's maths that need no model.

Each anchor compares a result of the code that trains with a known one: a definition written out, numbers computed by
hand, an optimum in closed form. `on_model.py` has the checks on the user's own base. `stage=verify` prints them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from align.core.types import Rollout
from align.ops.gae import compute_token_rewards, gae
from align.ops.kl import kl_k1
from align.ops.losses import policy_loss, value_loss
from align.ops.moments import Moments
from align.ppo.experience import Estimator, shape_scores
from align.ppo.update import Losses
from align.ppo.verify.closed_form import Problem, train_on_problem


@dataclass(frozen=True, slots=True)
class Anchor:
    """The result of one check: the measured deviation from a claim, and the largest allowed deviation.

    Attributes:
        claim: what must be true.
        measured: the deviation from it.
        tolerance: the largest deviation that rounding explains.
    """

    name: str
    claim: str
    measured: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.tolerance  # False for NaN


def check_maths() -> Iterator[Anchor]:
    """Run the checks of PPO's maths that need no model and yield their results."""
    yield check_gae()
    yield check_rewards()
    yield check_scores()
    yield check_losses()
    yield check_closed_form()
    yield check_closed_form_of_rloo()


def largest_difference(*pairs: tuple[Tensor, Tensor]) -> float:
    """Return the largest absolute difference between two tensors, over all given pairs."""
    return max(float((result - expected).abs().max()) for result, expected in pairs)


def make_ragged_batch(rows: int = 6, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Return random rewards and values [B, T] in fp64 and their mask, with responses of every length up to `width`.
    Outside the mask are large numbers."""
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(width) < (torch.arange(rows) % width + 1)[:, None]
    rewards, values = torch.randn(2, rows, width, generator=g, dtype=torch.double)
    return torch.where(mask, rewards, 1e3), torch.where(mask, values, -1e3), mask


def check_gae() -> Anchor:
    """Compare GAE's advantages and returns with their definition as explicit sums, A_t = Σ_k (γλ)^k (r_{t+k} + γ
    V_{t+k+1} − V_{t+k})."""
    rewards, values, mask = make_ragged_batch()
    gamma = 0.9
    lam = 0.8
    worst = 0.0
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
    return Anchor("gae", "advantages and returns are the sums that define them, and 0 after the end", worst, 1e-9)


def check_rewards() -> Anchor:
    """Compare the token rewards of two responses with numbers computed by hand from score and KL penalty."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    policy = torch.tensor([[-1.0, -2.0, 9.0], [-0.5, -1.0, -3.0]], dtype=torch.double)
    reference = torch.tensor([[-1.5, -1.0, 7.0], [-0.5, -2.0, -1.0]], dtype=torch.double)
    rewards = compute_token_rewards(torch.tensor([2.0, -1.0]), kl_k1(policy, reference), mask, 0.1)
    expected = torch.tensor([[-0.05, 2.1, 0.0], [0.0, -0.1, -0.8]], dtype=torch.double)
    off = largest_difference((rewards, expected))
    return Anchor("rewards", "−kl_coef·KL at each token, the score at the last", off, 1e-6)


def check_scores() -> Anchor:
    """Compare shaped scores with numbers computed by hand, from raw scores of mean 1 and deviation 2."""
    tokens = torch.ones(3, 2, dtype=torch.long)
    rollout = Rollout(tokens, tokens.bool(), 1, torch.tensor([True, False, True]))
    raw = torch.tensor([2.0, -1.0, 9.0], dtype=torch.double)
    scores = shape_scores(raw, rollout, Moments(4, 1.0, 16.0), score_scale=0.4, score_clip=1.5, missing_eos_penalty=0.3)
    off = largest_difference((scores, torch.tensor([0.2, -0.7, 0.6], dtype=torch.double)))
    return Anchor("scores", "(raw − mean) / std, clipped, scaled, less the penalty for a missing end", off, 1e-9)


def check_losses() -> Anchor:
    """Compare the policy and value losses with numbers computed by hand. Of four ratios two are clipped, of two values
    one."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    ratio, advantages = torch.tensor([[[1.5, 0.5, 1.5, 0.5]], [[1.0, -1.0, -1.0, 1.0]]], dtype=torch.double)
    policy = policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, mask, 0.2, 4.0).loss
    values, old, returns = torch.tensor([[[2.0, 0.9]], [[1.0, 1.0]], [[3.0, 0.0]]], dtype=torch.double)
    value = value_loss(values, old, returns, mask[:, :2], 2.0, 0.2).loss
    expected = torch.tensor([-(1.2 - 0.8 - 1.5 + 0.5) / 4, (1.8**2 + 0.9**2) / 4], dtype=torch.double)
    off = largest_difference((torch.stack([policy, value]), expected))
    return Anchor("losses", "the smaller surrogate of two, the larger value error of two", off, 1e-9)


def check_closed_form() -> Anchor:
    """Train PPO on all sequences of up to two tokens, and compare the objective that it reaches with the known
    optimum."""
    problem = Problem(vocabulary=6, length=2, beta=0.5)
    off = abs(problem.compute_optimum() - train_on_problem(problem).reached)
    return Anchor("closed form", "PPO reaches the known optimum J* of an enumerable problem", off, 1e-3)


def check_closed_form_of_rloo() -> Anchor:
    """Train RLOO on all sequences of up to two tokens, and compare the objective that it reaches with the known
    optimum."""
    problem = Problem(vocabulary=6, length=2, beta=0.5)
    reached = train_on_problem(problem, Estimator("rloo", 8), Losses(loss_mean="constant", longest=2)).reached
    off = abs(problem.compute_optimum() - reached)
    return Anchor("no critic", "RLOO reaches it too", off, 1e-3)
