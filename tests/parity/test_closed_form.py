"""PPO's operations reach the known optimum of problems that can be enumerated."""

from __future__ import annotations

import pytest
import torch

from align.ppo.verify.closed_form import Problem, solved

LENGTHS = [(16, 1, 0.95), (6, 2, 0.95), (6, 2, 1.0), (4, 3, 0.95)]


@pytest.mark.parametrize(("vocabulary", "length", "lam"), LENGTHS)
def test_ppo_reaches_the_closed_form(vocabulary: int, length: int, lam: float):
    problem = Problem(vocabulary, length, beta=0.5)
    found, best = solved(problem, lam), problem.optimum()
    assert best - found.start > 0.1  # there was something to learn
    assert found.reached <= best + 1e-6
    assert found.reached == pytest.approx(best, abs=1e-3)
    assert found.entry == pytest.approx(best, abs=0.02)


@pytest.mark.parametrize(("vocabulary", "length"), [(5, 1), (4, 2), (3, 3)])
def test_the_optimum_is_where_climbing_the_objective_itself_ends(vocabulary: int, length: int):
    problem = Problem(vocabulary, length, beta=0.5)
    assert problem.logprobs(problem.reference.double()).sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    table = problem.reference.double().requires_grad_()
    climber = torch.optim.LBFGS([table], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        climber.zero_grad()
        value = -problem.objective(table)
        value.backward()
        return value

    climber.step(loss)  # pyright: ignore[reportArgumentType]
    assert float(problem.objective(table.detach())) == pytest.approx(problem.optimum(), abs=1e-6)


def test_every_sequence_is_there_once():
    problem = Problem(3, 3, beta=1.0)
    assert len(problem.tokens) == 1 + 2 + 4 + 8  # [0], [a 0], [a b 0] and [a b c] with letters of 2
    assert problem.mask.sum(1).tolist().count(3) == 12
