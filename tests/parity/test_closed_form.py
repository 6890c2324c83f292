"""The optimum is known: for a fixed reward r and a price β of KL, π* ∝ π_ref · exp(r / β) and J* = β · log Z.

On a problem small enough to enumerate, the operations of PPO must get there.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.ops.gae import gae, token_rewards
from align.ops.kl import kl_k1
from align.ops.losses import policy_loss, value_loss

STOP = 0  # ends a sequence, so that lengths differ


class Problem:
    """Sequences of at most `length` tokens, tabular policies over them, and a reward for each whole sequence.

    A state is the previous token, or `vocabulary` at the start; with two tokens at most, that is the whole history.
    """

    def __init__(self, vocabulary: int, length: int, beta: float) -> None:
        g = torch.Generator().manual_seed(0)
        self.vocabulary, self.beta = vocabulary, beta
        grid = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)
        mask = torch.ones_like(grid, dtype=torch.bool)
        mask[:, 1:] = (grid[:, :-1] != STOP).cumprod(1).bool()
        self.tokens = torch.unique(torch.where(mask, grid, STOP), dim=0)  # every sequence, padded with STOP
        self.mask = torch.ones_like(self.tokens, dtype=torch.bool)
        self.mask[:, 1:] = (self.tokens[:, :-1] != STOP).cumprod(1).bool()
        self.reference = torch.randn(vocabulary + 1, vocabulary, generator=g).log_softmax(-1)
        self.reward = torch.randn(len(self.tokens), generator=g)

    def states(self) -> Tensor:
        start = torch.full_like(self.tokens[:, :1], self.vocabulary)
        return torch.cat([start, self.tokens[:, :-1]], dim=1)

    def logprobs(self, table: Tensor) -> Tensor:
        """Of every token of every sequence, 0 behind its end."""
        picked = table.log_softmax(-1)[self.states(), self.tokens]
        return torch.where(self.mask, picked, torch.zeros_like(picked))

    def objective(self, table: Tensor) -> float:
        """J = E[r − β log π / π_ref], summed over all sequences in fp64."""
        log_p, log_ref = (self.logprobs(t.double()).sum(1) for t in (table, self.reference))
        assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
        return float((log_p.exp() * (self.reward - self.beta * (log_p - log_ref))).sum())

    def optimum(self) -> float:
        log_ref = self.logprobs(self.reference.double()).sum(1)
        return self.beta * float((log_ref + self.reward / self.beta).logsumexp(0))


@pytest.mark.parametrize(("vocabulary", "length", "lam"), [(16, 1, 0.95), (6, 2, 0.95), (6, 2, 1.0)])
def test_ppo_reaches_the_closed_form(vocabulary: int, length: int, lam: float):
    problem = Problem(vocabulary, length, beta=0.5)
    g = torch.Generator().manual_seed(1)
    table = problem.reference.clone().requires_grad_()
    value = torch.zeros(vocabulary + 1, requires_grad=True)
    updates, batch = 300, 256
    optimiser = torch.optim.Adam([{"params": [table], "lr": 0.05}, {"params": [value], "lr": 0.05}])
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=updates)
    log_ref_all, states_all = problem.logprobs(problem.reference), problem.states()
    start, best = problem.objective(table.detach()), problem.optimum()
    for _ in range(updates):
        with torch.no_grad():
            old_all = problem.logprobs(table)
            rows = torch.multinomial(old_all.sum(1).exp(), batch, replacement=True, generator=g)
            mask, states, old = problem.mask[rows], states_all[rows], old_all[rows]
            rewards = token_rewards(problem.reward[rows], kl_k1(old, log_ref_all[rows]), mask, problem.beta)
            old_values = value[states]
            advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=lam)
        count = float(mask.sum())
        for _ in range(2):
            surrogate = policy_loss(problem.logprobs(table)[rows], old, advantages, mask, 0.2, count)
            fit = value_loss(value[states], old_values, returns, mask, count)
            optimiser.zero_grad()
            (surrogate.loss + fit.loss).backward()
            optimiser.step()
        decay.step()
    reached = problem.objective(table.detach())
    assert best - start > 0.1  # there was something to learn
    assert reached <= best + 1e-6
    assert reached == pytest.approx(best, abs=1e-3)
    entry = value.detach()[vocabulary].item()  # at the optimum the value of the start is J* itself
    assert entry == pytest.approx(best, abs=0.02)
