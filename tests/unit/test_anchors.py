"""Anchors hold on correct code, and each way to break the code makes the listed anchors fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tiny_roles import PAD, PROMPTS, STOPS, World
from torch import Tensor

import align.models.roles
import align.ops.gae
import align.ops.losses
import align.ppo.experience
import align.ppo.update
import align.ppo.verify.anchors
import align.ppo.verify.closed_form
import align.ppo.verify.on_model
import align.rollout.hf
from align.core.types import Rollout
from align.models.roles import ForwardOutput, Roles
from align.ppo.experience import Estimator
from align.ppo.update import Losses
from align.ppo.verify.anchors import (
    Anchor,
    check_closed_form,
    check_closed_form_of_rloo,
    check_gae,
    check_losses,
    check_maths,
    check_rewards,
    check_scores,
)
from align.ppo.verify.on_model import (
    Setting,
    check_experience,
    check_invariance,
    check_isolation,
    check_on_model,
    check_policy_gradient,
    check_ratio,
    check_sampling,
    check_value_gradient,
)
from align.rollout.engine import derive_row_seeds
from align.rollout.hf import HfEngine

MODULES = (
    align.ops.gae,
    align.ops.losses,
    align.ppo.experience,
    align.ppo.verify.anchors,
    align.ppo.verify.closed_form,
    align.ppo.experience,
    align.ppo.update,
    align.ppo.verify.on_model,
    align.models.roles,
    align.rollout.hf,
)
TEMPERATURE = 0.8
REWARDING = {
    "kl_coef": 0.1,
    "kl_estimator": "k1",
    "kl_in_reward": True,
    "estimator": Estimator(gamma=0.9),
    "whiten_rewards": False,
}
LEARNING = Losses(value_clip_range=0.2)


MATHS = {
    "gae": check_gae,
    "rewards": check_rewards,
    "scores": check_scores,
    "losses": check_losses,
    "closed form": check_closed_form,
    "no critic": check_closed_form_of_rloo,
}
ON_MODEL = {
    "first ratio": check_ratio,
    "experience": check_experience,
    "first gradient": check_policy_gradient,
    "value gradient": check_value_gradient,
    "invariance": check_invariance,
    "isolation": check_isolation,
}


def batch(
    world: World, backbone: str = "own", losses: Losses = LEARNING, bootstrap: bool = False, **changes: Any
) -> tuple[Setting, Any]:
    """Return a batch of a trained policy, and a function that samples another. `changes` are arguments of
    `assemble_experience`."""
    roles = world.roles(backbone=backbone)
    with torch.no_grad():  # as after some updates: a policy that is the reference would hide a swap
        for parameter in (p for role in roles.trainable for p in roles.parameters_of(role)):
            parameter += 0.02 * torch.randn_like(parameter)
    engine = HfEngine(STOPS, PAD, 8, TEMPERATURE)
    rollouts = 0

    def draw(times: int = 20) -> Rollout:
        nonlocal rollouts
        rollouts += 1
        seeds = derive_row_seeds(range(len(PROMPTS) * times), rollouts)
        return engine.generate(PROMPTS * times, roles.actor("policy"), seeds)

    return Setting(roles, draw(1), TEMPERATURE, 3, False, REWARDING | changes, losses, bootstrap), draw


def run_anchor(name: str, world: World, backbone: str = "own", **options: Any) -> Anchor:
    if name in MATHS:
        return MATHS[name]()
    setting, draw = batch(world, backbone, **options)
    anchor = check_sampling(setting, draw) if name == "sampling" else ON_MODEL[name](setting)
    assert anchor.name == name
    return anchor


def failing(anchors: Iterable[Anchor]) -> set[str]:
    return {anchor.name for anchor in anchors if not anchor.holds}


def test_those_of_the_maths_hold():
    anchors = list(check_maths())
    assert [anchor.name for anchor in anchors] == list(MATHS)
    assert failing(anchors) == set()


@pytest.mark.parametrize("backbone", ["own", "policy", "frozen"])
def test_those_on_a_model_hold(world: World, backbone: str):
    anchors = list(check_on_model(*batch(world, backbone)))
    assert [anchor.name for anchor in anchors] == [*ON_MODEL, "sampling"]
    assert failing(anchors) == set()


def test_they_hold_of_other_settings(world: World):
    assert failing(check_on_model(*batch(world, bootstrap=True, kl_estimator="k3", whiten_rewards=True))) == set()
    losses = Losses(kl_coef=0.3, kl_estimator="k3")
    assert failing(check_on_model(*batch(world, "policy", losses, kl_in_reward=False))) == set()


def test_the_roles_are_left_as_they_were(world: World):
    roles = world.roles()
    parameters_before = [p.detach().clone() for role in ("policy", "value") for p in roles.parameters_of(role)]
    engine = HfEngine(STOPS, PAD, 8, TEMPERATURE)

    def draw() -> Rollout:
        return engine.generate(PROMPTS, roles.actor("policy"), range(len(PROMPTS)))

    assert list(check_on_model(Setting(roles, draw(), TEMPERATURE, 3, False, REWARDING, LEARNING), draw))
    parameters_after = [p for role in ("policy", "value") for p in roles.parameters_of(role)]
    assert all(torch.equal(a, b) for a, b in zip(parameters_before, parameters_after, strict=True))
    assert all(p.grad is None for p in parameters_after)


def break_function(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a function by `make(original)` in every module that uses it."""
    places = [module for module in MODULES if hasattr(module, name)]
    original = getattr(places[0], name)
    for module in places:
        monkeypatch.setattr(module, name, make(original))


def delay_values(gae: Any) -> Any:
    return lambda rewards, values, *args: gae(rewards, values.roll(1, 1), *args)


def reward_kl(token_rewards: Any) -> Any:
    return lambda scores, kl, mask, coef: token_rewards(scores, kl, mask, -coef)


def pay_score_at_width(token_rewards: Any) -> Any:
    def pay_late(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
        rewards = token_rewards(torch.zeros_like(scores), kl, mask, coef)
        rewards[:, -1] += scores
        return rewards

    return pay_late


def negate_advantages(policy_loss: Any) -> Any:
    return lambda logprobs, old, advantages, *args: policy_loss(logprobs, old, -advantages, *args)


def ignore_mask(policy_loss: Any) -> Any:
    def compute_unmasked_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *args: Any) -> Any:
        return policy_loss(logprobs, old, advantages, torch.ones_like(mask), *args)

    return compute_unmasked_loss


def average_each_piece(policy_loss: Any) -> Any:
    def compute_loss_of_piece(
        logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, count: float, *args: Any
    ) -> Any:
        return policy_loss(logprobs, old, advantages, mask, clip, float(mask.sum()), *args)

    return compute_loss_of_piece


def replace_returns_by_old_values(value_loss: Any) -> Any:
    return lambda values, old, returns, *args: value_loss(values, old, old, *args)


def disable_clipping(loss: Any) -> Any:
    return lambda *args: loss(*args[:4], 1e9, *args[5:]) if len(args) > 5 else loss(*args)


def whiten_padding(masked_whiten: Any) -> Any:
    return lambda x, mask, **options: masked_whiten(x, torch.ones_like(mask), **options)


def negate_whitened(masked_whiten: Any) -> Any:
    return lambda *args, **options: -masked_whiten(*args, **options)


def swap_policy_and_reference(experience: Any) -> Any:
    return lambda rollout, scores, old, ref, *args, **options: experience(rollout, scores, ref, old, *args, **options)


def negate_shaping(shaped_scores: Any) -> Any:
    return lambda raw, *args, **options: -shaped_scores(-raw, *args, **options)


def read_values_a_state_early(values_behind: Any) -> Any:
    def read_values(self: Roles, rollout: Rollout) -> Tensor:
        last = rollout.lengths_B - 1
        return self.values(rollout).detach().gather(1, last[:, None]).squeeze(1)

    return read_values


def score_at_temperature_1(read_response: Any) -> Any:
    return lambda model, rollout, temperature: read_response(model, rollout, 1.0)


def draw_from_top_five(draw: Any) -> Any:
    def draw_token(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
        threshold = probabilities_BV.topk(5).values[:, -1:]
        return draw(torch.where(probabilities_BV >= threshold, probabilities_BV, 0.0), uniform_B)

    return draw_token


@pytest.mark.parametrize(
    ("name", "make", "noticed"),
    [
        ("gae", delay_values, {"gae"}),
        ("compute_token_rewards", reward_kl, {"rewards", "closed form"}),
        ("compute_token_rewards", pay_score_at_width, {"rewards"}),
        ("policy_loss", negate_advantages, {"first gradient", "closed form"}),
        ("policy_loss", ignore_mask, {"first ratio"}),
        ("policy_loss", average_each_piece, {"first gradient", "invariance"}),
        ("score_response", score_at_temperature_1, {"sampling", "first gradient"}),
        ("draw_tokens", draw_from_top_five, {"sampling"}),
        ("policy_loss", disable_clipping, {"losses"}),
        ("value_loss", replace_returns_by_old_values, {"losses", "value gradient"}),
        ("masked_whiten", whiten_padding, {"experience"}),
        ("masked_whiten", negate_whitened, {"experience", "closed form"}),
        ("assemble_experience", swap_policy_and_reference, {"experience"}),
        ("shape_scores", negate_shaping, {"scores"}),
    ],
)
def test_what_is_broken_is_noticed(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any], noticed: set[str]
):
    break_function(monkeypatch, name, make)
    assert failing(run_anchor(each, world) for each in noticed) == noticed


def test_a_cut_that_is_valued_a_state_early(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Roles, "compute_final_values", read_values_a_state_early(Roles.compute_final_values))
    assert not run_anchor("experience", world, bootstrap=True).holds


def test_a_value_loss_that_reaches_the_policy(world: World, monkeypatch: pytest.MonkeyPatch):
    logprobs = Roles.logprobs

    def compute_attached_logprobs(
        self: Roles, role: str, rollout: Rollout, temperature: float, train: bool = False
    ) -> ForwardOutput:
        output = logprobs(self, role, rollout, temperature, train)
        if not train:
            return output
        from align.models.forward import compute_hidden_states, select_predicting_states

        with self.use(role, train):
            return output._replace(
                states_BTD=select_predicting_states(
                    compute_hidden_states(self.model, rollout.tokens_BS, rollout.mask_BS), rollout
                )
            )

    monkeypatch.setattr(Roles, "logprobs", compute_attached_logprobs)
    assert not run_anchor("isolation", world, "policy").holds


def test_a_reference_that_is_the_policy(world: World, monkeypatch: pytest.MonkeyPatch):
    use = Roles.use

    def use_policy(self: Roles, role: str, train: bool = False) -> Any:
        return use(self, "policy" if role == "reference" else role, train)

    monkeypatch.setattr(Roles, "use", use_policy)
    assert not run_anchor("isolation", world).holds
