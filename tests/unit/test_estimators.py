"""Advantages without a critic, compared with second implementations; their mean gradients; and updates with them."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from test_anchors import LEARNING, batch, failing
from tiny_roles import World
from torch import Tensor, tensor
from torch.testing import assert_close

from align.models.forward import compute_in_chunks
from align.models.lora import Lora
from align.models.roles import Roles
from align.ops.advantages import group_relative, leave_one_out, mark_equal_groups, subtract_group_mean
from align.ops.losses import compute_loss_divisor, compute_loss_weights, policy_loss
from align.ppo.experience import Estimator, Experience, assemble_experience, estimate_advantages
from align.ppo.update import Losses, accumulate_gradients, take_gradient_steps
from align.ppo.verify.enumerated import check_unbiased, list_choices, measure_biases
from align.ppo.verify.on_model import check_on_model

ESTIMATORS = [
    Estimator("rloo", 2),
    Estimator("rloo", 3),
    Estimator("grpo", 2),
    Estimator("grpo", 3, "batch"),
    Estimator("grpo", 6, "none"),
    Estimator("reinforce_pp"),
    Estimator("reinforce_pp", 3, gamma=0.9),
]
MEANS = ("token", "sequence", "constant")


def draw_rewards(seed: int = 0, rows: int = 12) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed)) * 3 + 50


# By loops over the answers.


@pytest.mark.parametrize("size", [2, 3, 4, 12])
def test_advantages_by_loops(size: int):
    scores = draw_rewards()
    rows = scores.double().tolist()
    groups = [rows[first : first + size] for first in range(0, 12, size)]
    rloo = [reward - sum(group[:k] + group[k + 1 :]) / (size - 1) for group in groups for k, reward in enumerate(group)]
    centred = [reward - statistics.fmean(group) for group in groups for reward in group]
    group_stds = [statistics.stdev(group) + 1e-4 for group in groups for _ in group]
    batch_std = statistics.stdev(rows) + 1e-4
    assert_close(leave_one_out(scores, size), tensor(rloo), atol=1e-5, rtol=0)
    assert_close(subtract_group_mean(scores, size), tensor(centred, dtype=torch.double), atol=1e-9, rtol=0)
    for scale, divisors in (("group", group_stds), ("batch", [batch_std] * 12), ("none", [1.0] * 12)):
        expected = [reward / divisor for reward, divisor in zip(centred, divisors, strict=True)]
        assert_close(group_relative(scores, size, scale), tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 5, 7, 8])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.3e5, 1e-30])
def test_answers_of_one_reward_have_no_advantage(size: int, value: float):
    scores = torch.full((size,), value)
    assert bool(mark_equal_groups(scores, size).all())
    for advantages in (
        leave_one_out(scores, size),
        *(group_relative(scores, size, s) for s in ("group", "batch", "none")),
    ):
        assert advantages.tolist() == [0.0] * size


def test_equal_groups_by_hand():
    assert mark_equal_groups(tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), 2).tolist() == [True, False, True]


@pytest.mark.parametrize(("rows", "size"), [(4, 1), (5, 2), (3, 4)])
def test_no_whole_groups(rows: int, size: int):
    with pytest.raises(ValueError, match="do not make groups"):
        leave_one_out(torch.zeros(rows), size)


def test_what_is_yet_to_come_by_hand():
    """Two answers of two tokens and of one: rewards 1 2 | 3, to go 3 2 | 3; whitened over three tokens."""
    token_rewards = tensor([[1.0, 2.0], [3.0, 0.0]])
    mask = tensor([[True, True], [True, False]])
    rewards_to_go = tensor([3.0, 2.0, 3.0])
    advantages, returns = estimate_advantages(Estimator("reinforce_pp"), token_rewards, mask)
    assert_close(advantages[mask], (rewards_to_go - rewards_to_go.mean()) / rewards_to_go.std(unbiased=False))
    assert returns is None
    centred = tensor([3.0 - 3.0, 2.0 - 3.0, 3.0 - 3.0])  # both are worth 3
    advantages, _ = estimate_advantages(Estimator("reinforce_pp", 2), token_rewards, mask)
    assert_close(advantages[mask], (centred - centred.mean()) / centred.std(unbiased=False))


def test_a_critic_is_asked_for_values():
    with pytest.raises(ValueError, match="needs values"):
        estimate_advantages(Estimator(), torch.zeros(2, 2), torch.ones(2, 2).bool())


def test_how_far_prompts_lie_apart_by_hand(world: World):
    """Mean scores 1 and 4 of two groups of three."""
    setting, _ = batch(world, "none", estimator=Estimator("grpo", 3))
    scores = tensor([0.0, 1.0, 2.0, 4.0, 4.0, 4.0])
    zeros = torch.zeros_like(setting.rollout.response_mask_BT, dtype=torch.float32)

    def compute_figures(estimator: Estimator) -> dict[str, float]:
        options: dict[str, Any] = {"kl_coef": 0.0, "kl_estimator": "k1", "kl_in_reward": False}
        return assemble_experience(setting.rollout, scores, zeros, zeros, estimator=estimator, **options)[1]

    assert compute_figures(Estimator("grpo", 3))["prompt_score_std"] == 1.5
    assert "prompt_score_std" not in compute_figures(Estimator("reinforce_pp"))


# Means, ratios and bounds of the loss.


MASK = tensor([[True, True, True], [True, False, False]])
OLD = torch.zeros(2, 3)
LOG_RATIO = tensor([[0.3, -0.1, 0.1], [0.5, 9.0, 9.0]])
GAIN = tensor([[1.0, 1.0, 1.0], [-1.0, 5.0, 5.0]])


@pytest.mark.parametrize(
    ("loss_mean", "expected"),
    [
        ("token", -(1.2 + 0.9048374 + 1.1051709 - 1.6487213) / 4),
        ("sequence", -((1.2 + 0.9048374 + 1.1051709) / 3 - 1.6487213) / 2),
        ("constant", -(1.2 + 0.9048374 + 1.1051709 - 1.6487213) / (2 * 5)),
    ],
)
def test_means_by_hand(loss_mean: str, expected: float):
    divisor = compute_loss_divisor(MASK, loss_mean, 5)
    weights = compute_loss_weights(MASK, loss_mean)
    assert float(policy_loss(LOG_RATIO, OLD, GAIN, MASK, 0.2, divisor, weights).loss) == pytest.approx(expected)


def test_a_higher_upper_bound_by_hand():
    loss_terms = policy_loss(LOG_RATIO, OLD, GAIN, MASK, 0.2, 1.0, clip_range_high=0.28)
    assert float(loss_terms.loss) == pytest.approx(-(1.28 + 0.9048374 + 1.1051709 - 1.6487213))


def test_one_ratio_for_a_response_by_hand():
    """exp of the mean of 0.3, −0.1 and 0.1 is 1.105, and of the other row 1.649, whose loss is not bounded."""
    loss_terms = policy_loss(LOG_RATIO, OLD, GAIN, MASK, 0.2, 1.0, importance_sampling_level="sequence")
    assert float(loss_terms.loss) == pytest.approx(-(3 * 1.1051709 - 1.6487213))
    assert float(loss_terms.sums["log_ratio"]) == pytest.approx(1.0)  # of tokens: the check of the first ratio reads it


# On average over all batches.


@pytest.fixture(scope="module")
def biased() -> dict[str, Any]:
    return measure_biases(3)


def test_what_should_be_unbiased_is(biased: dict[str, Any]):
    anchors = list(check_unbiased(biased, 3))
    assert len(anchors) == 2
    assert failing(anchors) == set()
    assert biased["rloo, constant"].scale == pytest.approx(0.5, abs=1e-4)  # of two tokens an answer may have
    assert biased["grpo without spread, constant"].scale == pytest.approx(0.5 * 2 / 3, abs=1e-4)  # (K − 1) / K of it


def test_what_is_biased_shows(biased: dict[str, Any]):
    for name, choice in list_choices(3).items():
        assert choice.unbiased or biased[name].angle > 0.2, name
    assert biased["grpo, token"].angle > 10 * biased["rloo, token"].angle


# On a model.


@pytest.mark.parametrize(
    "estimator", ESTIMATORS, ids=lambda estimator: f"{estimator.name}-{estimator.group_size}-{estimator.scale}"
)
@pytest.mark.parametrize("loss_mean", MEANS)
def test_the_anchors_hold(world: World, estimator: Estimator, loss_mean: str):
    losses = LEARNING._replace(loss_mean=loss_mean, longest=8)
    setting, draw = batch(world, "none", losses, estimator=estimator)
    anchors = list(check_on_model(setting, draw))
    assert "value gradient" not in [anchor.name for anchor in anchors]
    assert failing(anchors) == set()


def test_the_anchors_hold_of_a_ratio_for_a_response_and_kl_in_the_loss(world: World):
    losses = Losses(importance_sampling_level="sequence", loss_mean="sequence", kl_coef=0.3, kl_estimator="k2")
    options = {"estimator": Estimator("grpo", 3), "kl_in_reward": False}
    assert failing(check_on_model(*batch(world, "none", losses, **options))) == set()


def test_nobody_has_the_value_role(world: World):
    roles = Roles(world.load(), world.init, [world.reward], Lora(4, 8), "none")
    assert roles.trainable == ("policy",)
    assert roles.parameters_of("value") == []
    assert not any(".value." in name for name, _ in roles.model.named_parameters())
    roles_with_value = world.roles()
    parameter_counts = [sum(p.numel() for p in role_set.model.parameters()) for role_set in (roles_with_value, roles)]
    assert parameter_counts[0] - parameter_counts[1] == sum(p.numel() for p in roles.parameters_of("policy"))


def build_grpo_experience(roles: Roles, rollout: Any, scores: Tensor) -> Experience:
    def compute_logprobs(role: str) -> Tensor:
        return compute_in_chunks(lambda part: roles.logprobs(role, part, 0.8)[0], rollout, 6)

    logprobs = compute_logprobs("policy"), compute_logprobs("reference")
    return assemble_experience(
        rollout, scores, *logprobs, estimator=Estimator("grpo", 3), kl_coef=0.1, kl_estimator="k1", kl_in_reward=False
    )[0]


def compute_gradient(roles: Roles, experience: Experience, losses: Losses) -> tuple[Tensor, dict[str, float]]:
    for parameter in roles.parameters_of("policy"):
        parameter.grad = None
    figures = accumulate_gradients(roles, experience, micro_batch=2, temperature=0.8, losses=losses)
    return torch.cat([p.grad.flatten() for p in roles.parameters_of("policy") if p.grad is not None]), figures


@pytest.mark.parametrize("loss_mean", MEANS)
def test_rows_that_teach_nothing_get_no_backward_pass(world: World, monkeypatch: pytest.MonkeyPatch, loss_mean: str):
    """The second group has equal scores. Its rows are skipped, and gradient and figures stay the same."""
    setting, _ = batch(world, "none", estimator=Estimator("grpo", 3))
    roles = setting.roles
    losses = Losses(loss_mean=loss_mean, longest=8)
    experience = build_grpo_experience(roles, setting.rollout, tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    row_counts = {True: 0, False: 0}
    run_logprobs = roles.logprobs

    def count_rows(role: str, part: Any, temperature: float, train: bool) -> Any:
        row_counts[train] += len(part.ended_B)
        return run_logprobs(role, part, temperature, train)

    monkeypatch.setattr(roles, "logprobs", count_rows)
    gradient, figures = compute_gradient(roles, experience, losses)
    assert row_counts == {True: 3, False: 3}
    monkeypatch.setattr(Experience, "split_by_learning", lambda self: [(self, True)])
    full_gradient, full_figures = compute_gradient(roles, experience, losses)
    assert row_counts == {True: 9, False: 3}
    assert (gradient - full_gradient).norm() / full_gradient.norm() < 1e-5
    assert figures == pytest.approx(full_figures, abs=1e-5)


def test_a_batch_that_teaches_nothing_is_no_step(world: World):
    """Momentum of earlier steps moves no weight either. With a KL term in the loss the batch is a step."""
    setting, _ = batch(world, "none", estimator=Estimator("grpo", 3))
    roles = setting.roles
    optimiser = torch.optim.AdamW(roles.parameters_of("policy"), lr=1e-2)

    def take_step(scores: Tensor, losses: Losses) -> tuple[float, bool]:
        experience = build_grpo_experience(roles, setting.rollout, scores)
        before = [p.detach().clone() for p in roles.parameters_of("policy")]
        figures = take_gradient_steps(
            roles,
            optimiser,
            experience,
            epochs=1,
            minibatch_count=1,
            max_grad_norm=1.0,
            micro_batch=3,
            temperature=0.8,
            generator=torch.Generator().manual_seed(0),
            losses=losses,
        )
        moved = not all(torch.equal(a, b) for a, b in zip(before, roles.parameters_of("policy"), strict=True))
        return figures["steps"], moved

    equal = torch.ones(6)
    assert take_step(draw_rewards(rows=6), Losses()) == (1.0, True)
    assert take_step(equal, Losses()) == (0.0, False)
    assert take_step(equal, Losses(kl_coef=0.1, kl_estimator="k3")) == (1.0, True)
