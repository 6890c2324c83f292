"""A reinforcement learning problem small enough to enumerate, whose known optimum PPO must reach.

For a fixed reward r and a KL coefficient β, the optimal policy is π* ∝ π_ref · exp(r / β). Its objective is
J* = β · log Z with Z = Σ π_ref · exp(r / β) over all sequences (Ziegler et al., 2019; Korbak et al., 2022).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align.core.types import Rollout
from align.models.roles import TRAINABLE, ForwardOutput
from align.ppo.experience import Estimator, assemble_experience
from align.ppo.update import Losses, take_gradient_steps

STOP = 0  # ends a sequence, so that lengths differ
PPO = Estimator()
CLIPPED = Losses()


class Problem:
    """A problem of all N sequences of at most `length` tokens, with a random reward for each and a random reference
    policy.

    A policy is a table of logits [prefixes, vocabulary].

    Attributes:
        tokens: every sequence [N, length], padded with STOP.
        mask: True on the tokens of each sequence, its first STOP included.
        states: the row of a table that each token is drawn from, which is the number of the prefix before it.
        reference: the reference policy.
        reward: [N].
    """

    def __init__(self, vocabulary: int, length: int, beta: float) -> None:
        g = torch.Generator().manual_seed(0)
        self.beta = beta
        grid = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).view(-1, length)
        self.tokens = torch.unique(torch.where(mask_through_stop(grid), grid, STOP), dim=0)
        self.mask = mask_through_stop(self.tokens)
        prefixes: dict[tuple[int, ...], int] = {}
        rows = self.tokens.tolist()
        states = [[prefixes.setdefault(tuple(row[:t]), len(prefixes)) for t in range(length)] for row in rows]
        self.states = torch.tensor(states)
        self.reference = torch.randn(len(prefixes), vocabulary, generator=g).log_softmax(-1)
        self.reward = torch.randn(len(rows), generator=g)

    def logprobs(self, table: Tensor) -> Tensor:
        """Return the logprob of every token of every sequence [N, length] under the policy with logits `table`, 0 after
        a sequence's end."""
        picked = table.log_softmax(-1)[self.states, self.tokens]
        return torch.where(self.mask, picked, torch.zeros_like(picked))

    def compute_expected_reward_less_kl(self, table: Tensor) -> Tensor:
        """Return the objective J = E[r − β log π / π_ref] of the policy with logits `table`, summed over all sequences
        in fp64."""
        log_p = self.logprobs(table.double()).sum(1)
        log_ref = self.logprobs(self.reference.double()).sum(1)
        return (log_p.exp() * (self.reward - self.beta * (log_p - log_ref))).sum()

    def compute_optimum(self) -> float:
        """Return the highest possible objective of any policy, J* = β log Σ π_ref exp(r / β)."""
        log_ref = self.logprobs(self.reference.double()).sum(1)
        return self.beta * float((log_ref + self.reward / self.beta).logsumexp(0))

    def rollout(self, rows: Tensor) -> Rollout:
        """Return the sequences with these numbers as a Rollout, each after a prompt of one arbitrary token."""
        prompt = torch.zeros(len(rows), 1, dtype=torch.long)
        tokens = self.tokens[rows]
        mask = torch.cat([torch.ones_like(prompt).bool(), self.mask[rows]], 1)
        return Rollout(torch.cat([prompt, tokens], 1), mask, 1, (tokens == STOP).any(1))

    def sequence_numbers(self, rollout: Rollout) -> Tensor:
        """Return the number of each row's response in the problem's list of sequences, [B]."""
        place_values = (self.reference.shape[1] ** torch.arange(self.tokens.shape[1])).flip(0)
        codes = (self.tokens * place_values).sum(1)
        width = rollout.response_BT.shape[1]
        return torch.searchsorted(codes, (rollout.response_BT * place_values[:width]).sum(1))


def mask_through_stop(tokens: Tensor) -> Tensor:
    """Return a mask of `tokens` that is True up to and including the first STOP of each row."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 1:] = (tokens[:, :-1] != STOP).cumprod(1).bool()
    return mask


class TableRoles:
    """Policy, reference and value function as tables over prefixes, with the interface of
    `align.models.roles.Roles`."""

    value_backbone = "value"
    trainable = TRAINABLE

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.policy = nn.Parameter(problem.reference.clone())
        self.value = nn.Parameter(torch.zeros(len(problem.reference)))

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return [self.policy if role == "policy" else self.value]

    def logprobs(self, role: str, rollout: Rollout, temperature: float, train: bool = False) -> ForwardOutput:
        table = self.policy if role == "policy" else self.problem.reference
        numbers = self.problem.sequence_numbers(rollout)
        with torch.set_grad_enabled(train):
            picked = self.problem.logprobs(table / temperature)[numbers][:, : rollout.response_BT.shape[1]]
        return ForwardOutput(picked, torch.zeros_like(picked).detach(), torch.empty(0))

    def values(self, rollout: Rollout, train: bool = False, policy_states_BTD: Tensor | None = None) -> Tensor:
        states = self.problem.states[self.problem.sequence_numbers(rollout)][:, : rollout.response_BT.shape[1]]
        with torch.set_grad_enabled(train):
            return self.value[states]

    def require_gradients(self, role: str) -> None:
        """Do nothing, because both tables always have gradients."""


class Solution(NamedTuple):
    """The objective J before and after training on an enumerable problem, and the learned value of its first state.

    Attributes:
        start: J of the reference.
        reached: J of the trained policy.
        entry: the trained value of the first state, which is J* too at the optimum.
    """

    start: float
    reached: float
    entry: float


def train_on_problem(
    problem: Problem, estimator: Estimator = PPO, losses: Losses = CLIPPED, *, updates: int = 300, batch: int = 512
) -> Solution:
    """Train a table policy on an enumerable problem with the training code of PPO runs, and return the objective that
    it reaches.

    The KL penalty is in the reward, unless `losses` has a KL coefficient.
    """
    g = torch.Generator().manual_seed(1)
    tables: Any = TableRoles(problem)
    tables.trainable = TRAINABLE if estimator.has_critic else TRAINABLE[:1]
    optimiser = torch.optim.Adam([tables.policy, tables.value], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=updates)
    for _ in range(updates):
        probabilities = problem.logprobs(tables.policy.detach()).sum(1).exp()
        rows = torch.multinomial(probabilities, batch, replacement=True, generator=g)
        rollout = problem.rollout(rows)
        experience, _ = assemble_experience(
            rollout,
            problem.reward[rows],
            tables.logprobs("policy", rollout, 1.0).logprobs_BT,
            tables.logprobs("reference", rollout, 1.0).logprobs_BT,
            tables.values(rollout) if estimator.has_critic else None,
            estimator=estimator,
            kl_coef=problem.beta,
            kl_estimator="k1",
            kl_in_reward=not losses.kl_coef,
        )
        take_gradient_steps(
            tables,
            optimiser,
            experience,
            epochs=2,
            minibatch_count=1,
            max_grad_norm=100.0,
            generator=g,
            micro_batch=batch,
            temperature=1.0,
            losses=losses,
        )
        decay.step()
    first = int(problem.states[0, 0])
    reached = problem.compute_expected_reward_less_kl(tables.policy.detach())
    return Solution(
        float(problem.compute_expected_reward_less_kl(problem.reference)),
        float(reached),
        float(tables.value.detach()[first]),
    )
