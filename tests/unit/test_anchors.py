"""The anchors hold on code that is right, and each way to break it is noticed by one that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_roles import PAD, PROMPTS, STOPS, World, make_world
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
    align.ops.gae, align.ops.losses, align.ppo.experience, align.ppo.verify.anchors, align.ppo.verify.closed_form,
    align.ppo.experience,
    align.ppo.update, align.ppo.verify.on_model, align.models.roles, align.rollout.hf,
)  # fmt: skip
TEMPERATURE = 0.8
REWARDING = {
    "kl_coef": 0.1, "kl_estimator": "k1", "kl_in_reward": True, "estimator": Estimator(gamma=0.9),
    "whiten_rewards": False,
}  # fmt: skip
LEARNING = Losses(value_clip_range=0.2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)


MATHS = {
    "gae": check_gae, "rewards": check_rewards, "scores": check_scores, "losses": check_losses,
    "closed form": check_closed_form, "no critic": check_closed_form_of_rloo,
}  # fmt: skip
ON_MODEL = {
    "first ratio": check_ratio, "experience": check_experience, "first gradient": check_policy_gradient,
    "value gradient": check_value_gradient, "invariance": check_invariance, "isolation": check_isolation,
}  # fmt: skip


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
    drawn = 0

    def draw(times: int = 20) -> Rollout:
        nonlocal drawn
        drawn += 1
        seeds = derive_row_seeds(range(len(PROMPTS) * times), drawn)
        return engine.generate(PROMPTS * times, roles.actor("policy"), seeds)

    return Setting(roles, draw(1), TEMPERATURE, 3, False, REWARDING | changes, losses, bootstrap), draw


def anchor(name: str, world: World, backbone: str = "own", **how: Any) -> Anchor:
    """One alone."""
    if name in MATHS:
        return MATHS[name]()
    setting, draw = batch(world, backbone, **how)
    found = check_sampling(setting, draw) if name == "sampling" else ON_MODEL[name](setting)
    assert found.name == name
    return found


def failing(found: Iterable[Anchor]) -> set[str]:
    return {anchor.name for anchor in found if not anchor.holds}


def test_those_of_the_maths_hold():
    found = list(check_maths())
    assert [anchor.name for anchor in found] == list(MATHS)
    assert failing(found) == set()


@pytest.mark.parametrize("backbone", ["own", "policy", "frozen"])
def test_those_on_a_model_hold(world: World, backbone: str):
    found = list(check_on_model(*batch(world, backbone)))
    assert [anchor.name for anchor in found] == [*ON_MODEL, "sampling"]
    assert failing(found) == set()


def test_they_hold_of_other_settings(world: World):
    assert failing(check_on_model(*batch(world, bootstrap=True, kl_estimator="k3", whiten_rewards=True))) == set()
    losses = Losses(kl_coef=0.3, kl_estimator="k3")
    assert failing(check_on_model(*batch(world, "policy", losses, kl_in_reward=False))) == set()


def test_the_roles_are_left_as_they_were(world: World):
    roles = world.roles()
    before = [p.detach().clone() for role in ("policy", "value") for p in roles.parameters_of(role)]
    engine = HfEngine(STOPS, PAD, 8, TEMPERATURE)

    def draw() -> Rollout:
        return engine.generate(PROMPTS, roles.actor("policy"), range(len(PROMPTS)))

    assert list(check_on_model(Setting(roles, draw(), TEMPERATURE, 3, False, REWARDING, LEARNING), draw))
    after = [p for role in ("policy", "value") for p in roles.parameters_of(role)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)


def broken(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(original)` wherever the function is used, as if its source said so."""
    places = [module for module in MODULES if hasattr(module, name)]
    original = getattr(places[0], name)
    for module in places:
        monkeypatch.setattr(module, name, make(original))


def a_step_late(gae: Any) -> Any:
    return lambda rewards, values, *rest: gae(rewards, values.roll(1, 1), *rest)


def kl_as_a_prize(token_rewards: Any) -> Any:
    return lambda scores, kl, mask, coef: token_rewards(scores, kl, mask, -coef)


def score_at_the_width(token_rewards: Any) -> Any:
    def paid_late(scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
        rewards = token_rewards(torch.zeros_like(scores), kl, mask, coef)
        rewards[:, -1] += scores
        return rewards

    return paid_late


def uphill(policy_loss: Any) -> Any:
    return lambda logprobs, old, advantages, *rest: policy_loss(logprobs, old, -advantages, *rest)


def without_mask(policy_loss: Any) -> Any:
    def everywhere(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *rest: Any) -> Any:
        return policy_loss(logprobs, old, advantages, torch.ones_like(mask), *rest)

    return everywhere


def mean_of_each_piece(policy_loss: Any) -> Any:
    def own_count(
        logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, count: float, *rest: Any
    ) -> Any:
        return policy_loss(logprobs, old, advantages, mask, clip, float(mask.sum()), *rest)

    return own_count


def as_if_it_never_moved(value_loss: Any) -> Any:
    return lambda values, old, returns, *rest: value_loss(values, old, old, *rest)


def unclipped(loss: Any) -> Any:
    return lambda *given: loss(*given[:4], 1e9, *given[5:]) if len(given) > 5 else loss(*given)


def of_padding_too(masked_whiten: Any) -> Any:
    return lambda x, mask, **how: masked_whiten(x, torch.ones_like(mask), **how)


def upside_down(masked_whiten: Any) -> Any:
    return lambda *given, **how: -masked_whiten(*given, **how)


def roles_swapped(experience: Any) -> Any:
    return lambda rollout, scores, old, ref, *rest, **how: experience(rollout, scores, ref, old, *rest, **how)


def for_the_end(shaped_scores: Any) -> Any:
    return lambda raw, *given, **how: -shaped_scores(-raw, *given, **how)


def of_the_state_before(values_behind: Any) -> Any:
    def shifted(self: Roles, rollout: Rollout) -> Tensor:
        last = rollout.lengths_B - 1
        return self.values(rollout).detach().gather(1, last[:, None]).squeeze(1)

    return shifted


def at_temperature_1(read_response: Any) -> Any:
    return lambda model, rollout, temperature: read_response(model, rollout, 1.0)


def top_five(draw: Any) -> Any:
    def drawn(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
        least = probabilities_BV.topk(5).values[:, -1:]
        return draw(torch.where(probabilities_BV >= least, probabilities_BV, 0.0), uniform_B)

    return drawn


@pytest.mark.parametrize(
    ("name", "make", "noticed"),
    [
        ("gae", a_step_late, {"gae"}),
        ("compute_token_rewards", kl_as_a_prize, {"rewards", "closed form"}),
        ("compute_token_rewards", score_at_the_width, {"rewards"}),
        ("policy_loss", uphill, {"first gradient", "closed form"}),
        ("policy_loss", without_mask, {"first ratio"}),
        ("policy_loss", mean_of_each_piece, {"first gradient", "invariance"}),
        ("score_response", at_temperature_1, {"sampling", "first gradient"}),
        ("draw_tokens", top_five, {"sampling"}),
        ("policy_loss", unclipped, {"losses"}),
        ("value_loss", as_if_it_never_moved, {"losses", "value gradient"}),
        ("masked_whiten", of_padding_too, {"experience"}),
        ("masked_whiten", upside_down, {"experience", "closed form"}),
        ("assemble_experience", roles_swapped, {"experience"}),
        ("shape_scores", for_the_end, {"scores"}),
    ],
)
def test_what_is_broken_is_noticed(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Any], Any], noticed: set[str]
):
    broken(monkeypatch, name, make)
    assert failing(anchor(each, world) for each in noticed) == noticed


def test_a_cut_that_is_valued_a_state_early(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Roles, "values_after", of_the_state_before(Roles.values_after))
    assert not anchor("experience", world, bootstrap=True).holds


def test_a_value_loss_that_reaches_the_policy(world: World, monkeypatch: pytest.MonkeyPatch):
    logprobs = Roles.logprobs

    def undetached(self: Roles, role: str, rollout: Rollout, temperature: float, train: bool = False) -> ForwardOutput:
        read = logprobs(self, role, rollout, temperature, train)
        if not train:
            return read
        from align.models.forward import compute_hidden_states, select_predicting_states

        with self.use(role, train):
            return read._replace(
                states_BTD=select_predicting_states(
                    compute_hidden_states(self.model, rollout.tokens_BS, rollout.mask_BS), rollout
                )
            )

    monkeypatch.setattr(Roles, "logprobs", undetached)
    assert not anchor("isolation", world, "policy").holds


def test_a_reference_that_is_the_policy(world: World, monkeypatch: pytest.MonkeyPatch):
    use = Roles.use

    def confused(self: Roles, role: str, train: bool = False) -> Any:
        return use(self, "policy" if role == "reference" else role, train)

    monkeypatch.setattr(Roles, "use", confused)
    assert not anchor("isolation", world).holds
