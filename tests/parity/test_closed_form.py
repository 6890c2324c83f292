"""PPO's operations reach the known optimum of problems that can be enumerated."""

from __future__ import annotations

import pytest
import torch

from align.ppo.experience import Estimator
from align.ppo.update import Losses
from align.ppo.verify.closed_form import Problem, train_on_problem

LENGTHS = [(16, 1, 0.95), (6, 2, 0.95), (6, 2, 1.0), (4, 3, 0.95)]


@pytest.mark.parametrize(("vocabulary", "length", "lam"), LENGTHS)
def test_ppo_reaches_the_closed_form(vocabulary: int, length: int, lam: float):
    problem = Problem(vocabulary, length, beta=0.5)
    solution = train_on_problem(problem, Estimator(lam=lam))
    best = problem.compute_optimum()
    assert best - solution.start > 0.1  # the start is not optimal
    assert solution.reached <= best + 1e-6
    assert solution.reached == pytest.approx(best, abs=1e-3)
    assert solution.entry == pytest.approx(best, abs=0.02)


WHOLE = Losses(loss_mean="constant", longest=2)
BY_SEQUENCE = Losses(loss_mean="sequence", importance_sampling_level="sequence")


@pytest.mark.parametrize(
    ("estimator", "losses"),
    [
        (Estimator("rloo", 4), WHOLE),
        (Estimator("rloo", 2), WHOLE),
        (Estimator("rloo", 8), BY_SEQUENCE),
        (Estimator("grpo", 8, "none"), WHOLE),
        (Estimator("grpo", 8, "batch"), Losses()),
        (Estimator("reinforce_pp"), Losses()),
        (Estimator("reinforce_pp", 8), Losses()),
    ],
)
def test_so_does_each_estimator_without_a_critic(estimator: Estimator, losses: Losses):
    problem = Problem(6, 2, beta=0.5)
    assert train_on_problem(problem, estimator, losses).reached == pytest.approx(problem.compute_optimum(), abs=1e-3)


@pytest.mark.parametrize(
    ("scale", "kl_estimator", "short"), [("group", "k3", 0.236), ("none", "k3", 0.074), ("none", "k2", 0.008)]
)
def test_kl_in_the_loss_ends_elsewhere(scale: str, kl_estimator: str, short: float):
    """The shortfalls are those of docs/ppo.md, of 0.5 that can be gained."""
    problem = Problem(6, 2, beta=0.5)
    losses = Losses(kl_coef=problem.beta, kl_estimator=kl_estimator)
    solution = train_on_problem(problem, Estimator("grpo", 8, scale), losses)
    assert problem.compute_optimum() - solution.reached == pytest.approx(short, abs=0.005)


@pytest.mark.parametrize(("vocabulary", "length"), [(5, 1), (4, 2), (3, 3)])
def test_the_optimum_is_where_climbing_the_objective_itself_ends(vocabulary: int, length: int):
    problem = Problem(vocabulary, length, beta=0.5)
    assert problem.logprobs(problem.reference.double()).sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    table = problem.reference.double().requires_grad_()
    climber = torch.optim.LBFGS([table], max_iter=500, line_search_fn="strong_wolfe")

    def compute_loss() -> torch.Tensor:
        climber.zero_grad()
        value = -problem.compute_expected_reward_less_kl(table)
        value.backward()
        return value

    climber.step(compute_loss)  # pyright: ignore[reportArgumentType]
    assert float(problem.compute_expected_reward_less_kl(table.detach())) == pytest.approx(
        problem.compute_optimum(), abs=1e-6
    )


def test_every_sequence_is_there_once():
    problem = Problem(3, 3, beta=1.0)
    assert len(problem.tokens) == 1 + 2 + 4 + 8  # [0], [a 0], [a b 0] and [a b c] with letters of 2
    assert problem.mask.sum(1).tolist().count(3) == 12
