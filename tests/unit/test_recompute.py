"""Layers recomputed in the backward pass under transformers' own forward, which is the default on CUDA.

A recomputed layer reads the adapter that is active at that time. With several adapters on one base it must be that of
the forward pass. If the other adapter trains too, torch raises no error and the gradient is lost.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_roles import World, build_ragged_rollout
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from align.models.fastpath import llama
from align.models.roles import TRAINABLE, CachedForward, Role, Roles
from align.ppo.experience import Experience
from align.ppo.update import Losses, accumulate_gradients

ROLLOUT = build_ragged_rollout()
TEMPERATURE = 0.8


def build_experience(roles: Roles) -> Experience:
    """Build an experience with noise, so that ratios and values are on both sides of their clips."""
    generator = torch.Generator().manual_seed(4)
    mask = ROLLOUT.response_mask_BT
    old, reference, values = roles.estimates(ROLLOUT, TEMPERATURE)
    noise = [0.3 * torch.randn(mask.shape, generator=generator) * mask for _ in range(4)]
    return Experience(ROLLOUT, old + noise[0], reference, noise[2], values * mask + noise[1], noise[3])


def interrupt_passes(roles: Roles, by_reward: bool) -> None:
    """Activate another role after every pass of policy and value: the reward model, or the other of the two."""
    logprobs = roles.logprobs
    values = roles.values

    def run_other_role(output: Any, role: Role) -> Any:
        if by_reward:
            roles.scores(ROLLOUT)
        else:
            with roles.use(role, train=True):
                pass
        return output

    roles.logprobs = lambda *a, **k: run_other_role(logprobs(*a, **k), "value")
    roles.values = lambda *a, **k: run_other_role(values(*a, **k), "policy")


def collect_gradients(
    roles: Roles, experience: Experience, cached: CachedForward | None, micro_batch: int
) -> dict[str, Tensor]:
    """Return the gradient of one minibatch as a vector per role, with 0 for parameters without a gradient."""
    accumulate_gradients(
        roles,
        experience,
        cached,
        micro_batch=micro_batch,
        temperature=TEMPERATURE,
        losses=Losses(value_clip_range=0.3, kl_coef=0.5, kl_estimator="k3"),
    )
    gradients = {}
    for role in TRAINABLE:
        parameters = roles.parameters_of(role)
        gradients[role] = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    return gradients


def record_passes(roles: Roles) -> list[bool]:
    """Return a list that gets an entry for each pass through the first layer: True if gradients were enabled."""
    grad_enabled: list[bool] = []
    layer: Any = next(m for m in roles.model.modules() if isinstance(m, GradientCheckpointingLayer))
    layer.self_attn.register_forward_pre_hook(lambda *a: grad_enabled.append(torch.is_grad_enabled()))
    return grad_enabled


@pytest.mark.parametrize(("backbone", "by_reward"), [("own", True), ("own", False), ("policy", True), ("frozen", True)])
@pytest.mark.parametrize("cached", [True, False])
def test_layers_computed_again_give_the_gradient_of_those_that_are_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, backbone: str, by_reward: bool, cached: bool
):
    monkeypatch.setattr(llama, "is_supported_call", lambda *a: False)
    keeping_roles = world.roles(backbone=backbone)
    recomputing_roles = world.roles(backbone=backbone)
    assert recomputing_roles.count_quantised_layers() == 14
    experience = build_experience(keeping_roles)
    micro_batch = 6 if cached else 4
    expected = collect_gradients(keeping_roles, experience, None, micro_batch)

    recomputing_roles.enable_gradient_checkpointing()
    interrupt_passes(recomputing_roles, by_reward)
    grad_enabled = record_passes(recomputing_roles)
    gradients = collect_gradients(
        recomputing_roles,
        experience,
        recomputing_roles.run_cached_forward(ROLLOUT, TEMPERATURE) if cached else None,
        micro_batch,
    )
    # Each forward is computed twice.
    assert grad_enabled.count(True) == (1 if cached else 2) * (2 if backbone == "own" else 1) * 2
    for role, vector in expected.items():
        assert vector.norm() > 1e-4
        assert (gradients[role] - vector).norm() <= 1e-6 * vector.norm(), role
