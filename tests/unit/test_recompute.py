"""Layers that are computed again in the backward pass, under transformers' own forward: what CUDA does by default.

A layer that is computed again reads whatever adapter is active by then, and with several on one base that must be the
one of the forward pass. Where the other one trains too, torch has nothing to object: the gradient is just lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_roles import World, make_world, ragged_rollout
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from align.models.fastpath import llama
from align.models.roles import TRAINABLE, CachedForward, Role, Roles
from align.ppo.experience import Experience
from align.ppo.update import Losses, accumulate_gradients

ROLLOUT, TEMPERATURE = ragged_rollout(), 0.8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)


def experience(roles: Roles) -> Experience:
    """Of another policy and other values, so that ratios and values are on both sides of their clips."""
    generator, mask = torch.Generator().manual_seed(4), ROLLOUT.response_mask_BT
    old, reference, values = roles.estimates(ROLLOUT, TEMPERATURE)
    noise = [0.3 * torch.randn(mask.shape, generator=generator) * mask for _ in range(4)]
    return Experience(ROLLOUT, old + noise[0], reference, noise[2], values * mask + noise[1], noise[3])


def interrupted(roles: Roles, by_reward: bool) -> None:
    """Another role plays behind every pass of policy and value: the reward model, or the other of the two, to train."""
    logprobs, values = roles.logprobs, roles.values

    def then(taken: Any, other: Role) -> Any:
        if by_reward:
            roles.scores(ROLLOUT)
        else:
            with roles.use(other, train=True):
                pass
        return taken

    roles.logprobs = lambda *a, **k: then(logprobs(*a, **k), "value")
    roles.values = lambda *a, **k: then(values(*a, **k), "policy")


def gradients(roles: Roles, made: Experience, cached: CachedForward | None, micro_batch: int) -> dict[str, Tensor]:
    """What one minibatch adds to each role, as one vector a role; 0 where nothing arrived."""
    accumulate_gradients(
        roles, made, cached, micro_batch=micro_batch, temperature=TEMPERATURE,
        losses=Losses(value_clip_range=0.3, kl_coef=0.5, kl_estimator="k3"),
    )  # fmt: skip
    found = {}
    for role in TRAINABLE:
        parameters = roles.parameters_of(role)
        found[role] = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    return found


def passes(roles: Roles) -> list[bool]:
    """Fills with one entry a pass through the first layer: whether gradients were on."""
    made: list[bool] = []
    layer: Any = next(m for m in roles.model.modules() if isinstance(m, GradientCheckpointingLayer))
    layer.self_attn.register_forward_pre_hook(lambda *a: made.append(torch.is_grad_enabled()))
    return made


@pytest.mark.parametrize(("backbone", "by_reward"), [("own", True), ("own", False), ("policy", True), ("frozen", True)])
@pytest.mark.parametrize("cached", [True, False])
def test_layers_computed_again_give_the_gradient_of_those_that_are_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, backbone: str, by_reward: bool, cached: bool
):
    monkeypatch.setattr(llama, "covers_call", lambda *a: False)
    kept, again = world.roles(backbone=backbone), world.roles(backbone=backbone)
    assert again.count_quantised_layers() == 14
    made, micro_batch = experience(kept), 6 if cached else 4
    expected = gradients(kept, made, None, micro_batch)

    again.recompute_layers()
    interrupted(again, by_reward)
    computed = passes(again)
    found = gradients(again, made, again.run_cached_forward(ROLLOUT, TEMPERATURE) if cached else None, micro_batch)
    assert (
        computed.count(True) == (1 if cached else 2) * (2 if backbone == "own" else 1) * 2
    )  # forwards, and each again
    for role, vector in expected.items():
        assert vector.norm() > 1e-4
        assert (found[role] - vector).norm() <= 1e-6 * vector.norm(), role
