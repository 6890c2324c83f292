"""A problem small enough to enumerate, whose optimum is known.

For a fixed reward r and a price β of KL the best policy is π* ∝ π_ref · exp(r / β), and it is worth J* = β · log Z with
Z = Σ π_ref · exp(r / β) over all sequences (Ziegler et al., 2019; Korbak et al., 2022). PPO must get there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align.core.types import Rollout
from align.models.roles import TRAINABLE, ForwardOutput
from align.ppo.advantages import Estimator
from align.ppo.experience import experience
from align.ppo.update import Losses, update

STOP = 0  # ends a sequence, so that lengths differ
PPO, CLIPPED = Estimator(), Losses()


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

    def rollout(self, rows: Tensor) -> Rollout:
        """Sequences by their number, behind a prompt of one token that says nothing."""
        prompt = torch.zeros(len(rows), 1, dtype=torch.long)
        tokens, mask = self.tokens[rows], self.mask[rows]
        whole = torch.cat([torch.ones_like(prompt).bool(), mask], 1)
        return Rollout(torch.cat([prompt, tokens], 1), whole, 1, (tokens == STOP).any(1))

    def numbers(self, rollout: Rollout) -> Tensor:
        """Which sequences a rollout has [B]."""
        places = (self.reference.shape[1] ** torch.arange(self.tokens.shape[1])).flip(0)
        known, width = (self.tokens * places).sum(1), rollout.response_BT.shape[1]
        return torch.searchsorted(known, (rollout.response_BT * places[:width]).sum(1))


def going_on(tokens: Tensor) -> Tensor:
    """True up to and including the first STOP of each row."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 1:] = (tokens[:, :-1] != STOP).cumprod(1).bool()
    return mask


class Tables:
    """Policy, reference and value as tables over prefixes, in the places of `align.models.roles.Roles`."""

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
        numbers, width = self.problem.numbers(rollout), rollout.response_BT.shape[1]
        with torch.set_grad_enabled(train):
            picked = self.problem.logprobs(table / temperature)[numbers][:, :width]
        return ForwardOutput(picked, torch.zeros_like(picked).detach(), torch.empty(0))

    def values(self, rollout: Rollout, train: bool = False, policy_states_BTD: Tensor | None = None) -> Tensor:
        states = self.problem.states[self.problem.numbers(rollout)][:, : rollout.response_BT.shape[1]]
        with torch.set_grad_enabled(train):
            return self.value[states]

    def trains(self, role: str) -> None:
        """Both always do."""


class Solved(NamedTuple):
    """J of the reference, J that the learner reached, and its value of the first state, which at PPO's optimum is J*
    too."""

    start: float
    reached: float
    entry: float


def solved(
    problem: Problem, estimator: Estimator = PPO, losses: Losses = CLIPPED, *, updates: int = 300, batch: int = 512
) -> Solved:
    """The learner on the problem, by the very functions that train: `experience` and `update`. The price of KL is in
    the reward, or where `losses` has it."""
    g = torch.Generator().manual_seed(1)
    tables: Any = Tables(problem)
    optimiser = torch.optim.Adam([tables.policy, tables.value], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=updates)
    for _ in range(updates):
        chances = problem.logprobs(tables.policy.detach()).sum(1).exp()
        rows = torch.multinomial(chances, batch, replacement=True, generator=g)
        rollout = problem.rollout(rows)
        old, ref = (tables.logprobs(role, rollout, 1.0).logprobs_BT for role in ("policy", "reference"))
        values = tables.values(rollout) if estimator.has_critic else None
        made, _ = experience(
            rollout, problem.reward[rows], old, ref, values, estimator=estimator, kl_coef=problem.beta,
            kl_estimator="k1", kl_in_reward=not losses.kl_coef,
        )  # fmt: skip
        tables.trainable = TRAINABLE if estimator.has_critic else TRAINABLE[:1]
        update(
            tables, optimiser, made, epochs=2, minibatch_count=1, max_grad_norm=100.0, generator=g, micro_batch=batch,
            temperature=1.0, losses=losses,
        )  # fmt: skip
        decay.step()
    first = int(problem.states[0, 0])
    reached = problem.objective(tables.policy.detach())
    return Solved(float(problem.objective(problem.reference)), float(reached), float(tables.value.detach()[first]))
