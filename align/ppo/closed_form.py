"""A problem small enough to enumerate, whose optimum is known.

For a fixed reward r and a price β of KL the best policy is π* ∝ π_ref · exp(r / β), and it is worth J* = β · log Z with
Z = Σ π_ref · exp(r / β) over all sequences (Ziegler et al., 2019; Korbak et al., 2022). PPO must get there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align.ops.gae import gae, token_rewards
from align.ops.kl import kl_k1
from align.ops.losses import policy_loss, value_loss

STOP = 0  # ends a sequence, so that lengths differ


class Problem:
    """Sequences of at most `length` tokens, a table of logits for every prefix, a reward for every whole sequence.

    Attributes:
        tokens: every sequence [N, length], padded with STOP.
        mask: True on its tokens, the STOP that ends it included.
        states: which row of a table each token is drawn from: the prefix before it.
        reference: logits [prefixes, vocabulary].
        reward: [N].
    """

    def __init__(self, vocabulary: int, length: int, beta: float) -> None:
        g = torch.Generator().manual_seed(0)
        self.beta = beta
        grid = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)
        self.tokens = torch.unique(torch.where(going_on(grid), grid, STOP), dim=0)
        self.mask = going_on(self.tokens)
        prefixes: dict[tuple[int, ...], int] = {}
        rows = self.tokens.tolist()
        states = [[prefixes.setdefault(tuple(row[:t]), len(prefixes)) for t in range(length)] for row in rows]
        self.states = torch.tensor(states)
        self.reference = torch.randn(len(prefixes), vocabulary, generator=g).log_softmax(-1)
        self.reward = torch.randn(len(rows), generator=g)

    def logprobs(self, table: Tensor) -> Tensor:
        """Of every token of every sequence [N, length], 0 behind its end."""
        picked = table.log_softmax(-1)[self.states, self.tokens]
        return torch.where(self.mask, picked, torch.zeros_like(picked))

    def objective(self, table: Tensor) -> Tensor:
        """J = E[r − β log π / π_ref], summed over all sequences in fp64."""
        log_p, log_ref = (self.logprobs(t.double()).sum(1) for t in (table, self.reference))
        return (log_p.exp() * (self.reward - self.beta * (log_p - log_ref))).sum()

    def optimum(self) -> float:
        """J*."""
        log_ref = self.logprobs(self.reference.double()).sum(1)
        return self.beta * float((log_ref + self.reward / self.beta).logsumexp(0))


def going_on(tokens: Tensor) -> Tensor:
    """True up to and including the first STOP of each row."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 1:] = (tokens[:, :-1] != STOP).cumprod(1).bool()
    return mask


class Solved(NamedTuple):
    """J of the reference, J that PPO reached, and its value of the first state, which at the optimum is J* too."""

    start: float
    reached: float
    entry: float


def solved(problem: Problem, lam: float = 0.95, updates: int = 600, batch: int = 512) -> Solved:
    """PPO on the problem, by the operations that train."""
    g = torch.Generator().manual_seed(1)
    table = problem.reference.clone().requires_grad_()
    value = torch.zeros(len(table), requires_grad=True)
    optimiser = torch.optim.Adam([table, value], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=updates)
    log_ref_all = problem.logprobs(problem.reference)
    for _ in range(updates):
        with torch.no_grad():
            old_all = problem.logprobs(table)
            rows = torch.multinomial(old_all.sum(1).exp(), batch, replacement=True, generator=g)
            mask, states, old = problem.mask[rows], problem.states[rows], old_all[rows]
            rewards = token_rewards(problem.reward[rows], kl_k1(old, log_ref_all[rows]), mask, problem.beta)
            old_values = value[states].clone()
            advantages, returns = gae(rewards, old_values, mask, 1.0, lam)
        count = float(mask.sum())
        for _ in range(2):
            surrogate = policy_loss(problem.logprobs(table)[rows], old, advantages, mask, 0.2, count)
            fit = value_loss(value[states], old_values, returns, mask, count)
            optimiser.zero_grad()
            (surrogate.loss + fit.loss).backward()
            optimiser.step()
        decay.step()
    first = int(problem.states[0, 0])
    reached = problem.objective(table.detach())
    return Solved(float(problem.objective(problem.reference)), float(reached), float(value.detach()[first]))
