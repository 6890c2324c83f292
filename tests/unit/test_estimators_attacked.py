"""Estimators without a critic from outside: what an update learns and shows, and settings that should not be taken."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_roles import World, make_world, ragged_rollout
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
from align.ppo.verify.on_model import take_gradient

ROLLOUT, TEMPERATURE = ragged_rollout(rows=8), 0.8
TELLS = tensor([1.0, 0.0, -1.0, 0.0, 0.5, 2.0, 0.0, 0.0])
"""Advantages of answers, of which half tell nothing."""


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> Roles:
    world: World = make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)
    torch.manual_seed(0)
    return world.roles("lora", backbone="none")


def experience(roles: Roles, tells_B: Tensor, weighted: bool = False) -> Experience:
    """Of another policy, so that ratios are on both sides of their clip."""
    generator, mask = torch.Generator().manual_seed(4), ROLLOUT.response_mask_BT
    old, reference = roles.estimates(ROLLOUT, TEMPERATURE)
    noise = 0.3 * torch.randn(mask.shape, generator=generator) * mask
    weights = (0.5 + torch.rand(mask.shape, generator=generator)) * mask if weighted else None
    return Experience(ROLLOUT, old + noise, reference, tells_B[:, None] * mask, weights_BT=weights)


def learned(roles: Roles, made: Experience, losses: Losses, micro_batch: int, **kept: Any) -> tuple[Tensor, Any]:
    sizes = {"micro_batch": micro_batch, "temperature": TEMPERATURE, "losses": losses}
    figures = accumulate_gradients(roles, made, **kept, **sizes)
    return take_gradient(roles, "policy"), figures


@pytest.mark.parametrize("loss_mean", ["token", "sequence", "constant"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("weighted", [False, True])
def test_answers_that_tell_nothing_change_no_gradient_and_are_in_every_figure(
    roles: Roles, loss_mean: str, level: str, weighted: bool
):
    """A pass that is kept has the backward pass of all rows; else those that tell nothing have none."""
    losses = Losses(importance_sampling_level=level, loss_mean=loss_mean, longest=9)
    made = experience(roles, TELLS, weighted)
    cached = roles.run_cached_forward(ROLLOUT, TEMPERATURE)
    gradient, figures = learned(roles, made, losses, 8, cached=cached)
    for micro_batch in (1, 3):
        other, shown = learned(roles, made, losses, micro_batch)
        assert float((other - gradient).norm() / gradient.norm()) < 1e-5
        assert shown == pytest.approx(figures, rel=1e-4, abs=1e-6)


def test_reinforce_pp_learns_from_answers_of_one_reward_too():
    """Whitening moves their advantages away from 0, unless nobody's answers differ."""
    mask = torch.arange(5) < tensor([5, 2, 3, 1])[:, None]
    for scores, zero in ((tensor([1.0, 0.0, 0.5, 0.5]), False), (tensor([1.0, 1.0, 0.5, 0.5]), True)):
        rewards = compute_token_rewards(scores, torch.zeros(4, 5), mask, 0.0)
        found = estimate_advantages(Estimator("reinforce_pp", 2), rewards, mask)[0]
        assert bool((found[2:][mask[2:]] == 0).all()) is zero
        assert bool((estimate_advantages(Estimator("rloo", 2), rewards, mask)[0][2:] == 0).all())


def pull(kind: str, away: float) -> Tensor:
    """The mean policy gradient of a price of KL in the reward and nothing else, over all answers to a small problem.

    Args:
        away: how far the policy's logits are from the reference's.
    """
    small, g = make_problem(), torch.Generator().manual_seed(0)
    table = small.reference.double()
    table = (table + away * torch.randn(table.shape, generator=g, dtype=torch.double)).requires_grad_(True)
    logprobs, reference = small.logprobs(table), small.logprobs(small.reference.double())
    price = ESTIMATORS[kind](logprobs.detach(), reference)
    rewards = compute_token_rewards(torch.zeros(len(reference)), price, small.mask, 1.0)
    chance = logprobs.detach().sum(1).exp()
    return torch.autograd.grad((chance * rewards.sum(1) * logprobs.sum(1)).sum(), table)[0]


@pytest.mark.parametrize("away", [0.01, 0.1])
def test_k3_in_the_reward_holds_nothing_back_near_the_reference(away: float):
    """k1 has the gradient of KL; that of k3 is smaller by another factor of the distance."""
    assert float(pull("k3", away).norm() / pull("k1", away).norm()) < 2 * away


def line(*words: str) -> Any:
    return build_config(compose_tree(["stage=ppo", "init=sft:latest", "reward.ref=reward:latest", *words]))


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("advantage", ["gae", "rloo", "reinforce_pp"])
def test_the_reward_takes_k1_alone(kind: str, advantage: str):
    with pytest.raises(InputError, match=rf"stage\.kl_estimator={kind}: .* Use k1, or add stage\.kl_in=loss"):
        line(f"stage.advantage={advantage}", f"stage.kl_estimator={kind}")
    assert line(f"stage.advantage={advantage}", "stage.kl_in=loss", f"stage.kl_estimator={kind}")


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
    empty = line(f"stage.advantage={advantage}").stage
    for word in same:
        assert line(f"stage.advantage={advantage}", word).stage == empty
    other: PpoConfig = line(f"stage.advantage={advantage}", "stage.group_size=4", "stage.clip_range_high=0.3").stage
    assert (other.group_size, other.clip_range_high) == (4, 0.3)


def test_an_engine_of_adapters_refuses_a_whole_model_before_any_weights():
    for engine in ("bank", "vllm"):
        with pytest.raises(InputError, match=rf"rollout\.engine={engine}: answers by adapters alone"):
            line("method=full", f"rollout={engine}")


def test_scores_that_fp32_cannot_square_are_refused():
    three = torch.ones(3, 2, dtype=torch.long)
    answers: Any = SimpleNamespace(rollout=Rollout(three, three.bool(), 1, torch.ones(3, dtype=torch.bool)))
    workers: Any = SimpleNamespace(scorer=SimpleNamespace(name="judge:big"))
    shaping = {"score_scale": 0.4, "score_clip": None, "missing_eos_penalty": 0.3}
    settings: Any = SimpleNamespace(shaping=shaping)
    as_they_are, standard = PpoState(0.0, Moments(1, 0.0, 1.0)), PpoState(0.0, Moments(1, 0.0, 1e60))
    raw = tensor([1e30, 0.0, -1e30])
    assert compute_scores(workers, settings, answers, raw, standard).tolist() == pytest.approx([0.4, 0.0, -0.4])
    for scores in (raw, tensor([3e38, 0.0, -3e38]), tensor([0.0, 1.0, float("nan")])):
        with pytest.raises(InputError, match=r"reward=judge:big: gives scores up to .* Scale the reward down"):
            compute_scores(workers, settings, answers, scores, as_they_are)


def test_a_correlation_of_large_scores_is_a_number():
    assert float(pearson_r(tensor([1e30, 2e30, 3e30]), tensor([1.0, 2.0, 3.0]))) == pytest.approx(1.0)


def test_a_run_says_how_many_answers_there_are_by_default():
    said = {advantage: on_the_card(asdict(line(f"stage.advantage={advantage}").stage)) for advantage in ("grpo", "gae")}
    assert said == {"grpo": "advantages by GRPO from 8 answers to each prompt; ", "gae": ""}
