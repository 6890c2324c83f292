"""Estimators without a critic, attacked: gradients and figures of an update, and settings that must be refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_roles import World, build_ragged_rollout, make_world
from torch import Tensor, tensor

from align.config.compose import build_config, compose_tree
from align.config.ppo import PpoConfig
from align.core.errors import InputError
from align.core.types import Rollout
from align.export.history import describe_estimator as on_the_card
from align.models.roles import Roles
from align.ops.gae import compute_token_rewards
from align.ops.kl import ESTIMATORS
from align.ops.moments import Moments
from align.ppo.checkpoint import PpoState
from align.ppo.experience import Estimator, Experience, estimate_advantages, pearson_r
from align.ppo.rollouts import compute_scores
from align.ppo.update import Losses, accumulate_gradients
from align.ppo.verify.enumerated import make_problem
from align.ppo.verify.on_model import pop_gradient

ROLLOUT = build_ragged_rollout(rows=8)
TEMPERATURE = 0.8
TELLS = tensor([1.0, 0.0, -1.0, 0.0, 0.5, 2.0, 0.0, 0.0])
"""Advantages of answers, half of which are 0."""


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> Roles:
    world: World = make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)
    torch.manual_seed(0)
    return world.roles("lora", backbone="none")


def build_clipped_experience(roles: Roles, advantages_B: Tensor, weighted: bool = False) -> Experience:
    """Build an experience of another policy, so that ratios are on both sides of their clip."""
    generator = torch.Generator().manual_seed(4)
    mask = ROLLOUT.response_mask_BT
    old, reference = roles.estimates(ROLLOUT, TEMPERATURE)
    noise = 0.3 * torch.randn(mask.shape, generator=generator) * mask
    weights = (0.5 + torch.rand(mask.shape, generator=generator)) * mask if weighted else None
    return Experience(ROLLOUT, old + noise, reference, advantages_B[:, None] * mask, weights_BT=weights)


def compute_gradient(
    roles: Roles, experience: Experience, losses: Losses, micro_batch: int, **options: Any
) -> tuple[Tensor, Any]:
    sizes = {"micro_batch": micro_batch, "temperature": TEMPERATURE, "losses": losses}
    figures = accumulate_gradients(roles, experience, **options, **sizes)
    return pop_gradient(roles, "policy"), figures


@pytest.mark.parametrize("loss_mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("weighted", [False, True])
def test_answers_that_tell_nothing_change_no_gradient_and_are_in_every_figure(
    roles: Roles, loss_mean: str, level: str, weighted: bool
):
    """A cached forward pass is run backward over all rows. Without a cache, rows without an advantage are skipped."""
    losses = Losses(importance_sampling_level=level, loss_mean=loss_mean, longest=9)
    experience = build_clipped_experience(roles, TELLS, weighted)
    cached = roles.run_cached_forward(ROLLOUT, TEMPERATURE)
    gradient, figures = compute_gradient(roles, experience, losses, 8, cached=cached)
    for micro_batch in (1, 3):
        row_gradient, row_figures = compute_gradient(roles, experience, losses, micro_batch)
        assert float((row_gradient - gradient).norm() / gradient.norm()) < 1e-5
        assert row_figures == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_reinforce_pp_learns_from_answers_of_one_reward_too():
    """Whitening moves their advantages away from 0, unless the answers of every group are equal."""
    mask = torch.arange(5) < tensor([5, 2, 3, 1])[:, None]
    for scores, is_zero in ((tensor([1.0, 0.0, 0.5, 0.5]), False), (tensor([1.0, 1.0, 0.5, 0.5]), True)):
        rewards = compute_token_rewards(scores, torch.zeros(4, 5), mask, 0.0)
        advantages = estimate_advantages(Estimator("reinforce_pp", 2), rewards, mask)[0]
        assert bool((advantages[2:][mask[2:]] == 0).all()) is is_zero
        assert bool((estimate_advantages(Estimator("rloo", 2), rewards, mask)[0][2:] == 0).all())


def compute_kl_gradient(kind: str, distance: float) -> Tensor:
    """Return the mean policy gradient of a KL reward alone, over all answers to a small problem.

    Args:
        distance: how far the policy's logits are from the reference's.
    """
    problem = make_problem()
    generator = torch.Generator().manual_seed(0)
    table = problem.reference.double()
    table = (table + distance * torch.randn(table.shape, generator=generator, dtype=torch.double)).requires_grad_(True)
    logprobs = problem.logprobs(table)
    reference = problem.logprobs(problem.reference.double())
    price = ESTIMATORS[kind](logprobs.detach(), reference)
    rewards = compute_token_rewards(torch.zeros(len(reference)), price, problem.mask, 1.0)
    chance = logprobs.detach().sum(1).exp()
    return torch.autograd.grad((chance * rewards.sum(1) * logprobs.sum(1)).sum(), table)[0]


@pytest.mark.parametrize("away", [0.01, 0.1])
def test_k3_in_the_reward_holds_nothing_back_near_the_reference(away: float):
    """k1 has the gradient of KL; that of k3 is smaller by another factor of the distance."""
    assert float(compute_kl_gradient("k3", away).norm() / compute_kl_gradient("k1", away).norm()) < 2 * away


def build_ppo_config(*words: str) -> Any:
    return build_config(compose_tree(["stage=ppo", "init=sft:latest", "reward.ref=reward:latest", *words]))


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("advantage", ["gae", "rloo", "reinforce_pp"])
def test_the_reward_takes_k1_alone(kind: str, advantage: str):
    with pytest.raises(InputError, match=rf"stage\.kl_estimator={kind}: .* Use k1, or add stage\.kl_in=loss"):
        build_ppo_config(f"stage.advantage={advantage}", f"stage.kl_estimator={kind}")
    assert build_ppo_config(f"stage.advantage={advantage}", "stage.kl_in=loss", f"stage.kl_estimator={kind}")


@pytest.mark.parametrize(
    ("advantage", "same"),
    [
        ("gae", ("stage.group_size=1", "stage.loss_mean=token", "stage.clip_range_high=0.2", "stage.kl_estimator=k1")),
        ("rloo", ("stage.group_size=8", "stage.loss_mean=constant", "stage.kl_in=reward")),
        ("grpo", ("stage.group_size=8", "stage.loss_mean=token", "stage.kl_in=loss", "stage.kl_estimator=k3")),
        ("reinforce_pp", ("stage.group_size=1", "stage.loss_mean=token", "stage.scale_rewards=group")),
    ],
)
def test_a_setting_that_is_written_out_names_the_same_run(advantage: str, same: tuple[str, ...]):
    default = build_ppo_config(f"stage.advantage={advantage}").stage
    for word in same:
        assert build_ppo_config(f"stage.advantage={advantage}", word).stage == default
    changed: PpoConfig = build_ppo_config(
        f"stage.advantage={advantage}", "stage.group_size=4", "stage.clip_range_high=0.3"
    ).stage
    assert (changed.group_size, changed.clip_range_high) == (4, 0.3)


def test_an_engine_of_adapters_refuses_a_whole_model_before_any_weights():
    for engine in ("bank", "vllm"):
        with pytest.raises(InputError, match=rf"rollout\.engine={engine}: answers by adapters alone"):
            build_ppo_config("method=full", f"rollout={engine}")


def test_scores_that_fp32_cannot_square_are_refused():
    tokens = torch.ones(3, 2, dtype=torch.long)
    answers: Any = SimpleNamespace(rollout=Rollout(tokens, tokens.bool(), 1, torch.ones(3, dtype=torch.bool)))
    workers: Any = SimpleNamespace(scorer=SimpleNamespace(name="judge:big"))
    shaping = {"score_scale": 0.4, "score_clip": None, "missing_eos_penalty": 0.3}
    settings: Any = SimpleNamespace(shaping=shaping)
    unscaled = PpoState(0.0, Moments(1, 0.0, 1.0))
    standardised = PpoState(0.0, Moments(1, 0.0, 1e60))
    raw = tensor([1e30, 0.0, -1e30])
    assert compute_scores(workers, settings, answers, raw, standardised).tolist() == pytest.approx([0.4, 0.0, -0.4])
    for scores in (raw, tensor([3e38, 0.0, -3e38]), tensor([0.0, 1.0, float("nan")])):
        with pytest.raises(InputError, match=r"reward=judge:big: gives scores up to .* Scale the reward down"):
            compute_scores(workers, settings, answers, scores, unscaled)


def test_a_correlation_of_large_scores_is_a_number():
    assert float(pearson_r(tensor([1e30, 2e30, 3e30]), tensor([1.0, 2.0, 3.0]))) == pytest.approx(1.0)


def test_a_run_says_how_many_answers_there_are_by_default():
    descriptions = {
        advantage: on_the_card(asdict(build_ppo_config(f"stage.advantage={advantage}").stage))
        for advantage in ("grpo", "gae")
    }
    assert descriptions == {"grpo": "advantages by GRPO from 8 answers to each prompt; ", "gae": ""}
