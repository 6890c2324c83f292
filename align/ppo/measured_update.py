"""Measurement of the peak memory of tensors in each phase of a worst-case PPO update."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from align.models.adapters import add_new_adapter, save_adapter
from align.models.base import choose_frozen_method
from align.models.forward import compute_in_chunks
from align.models.load import DTYPES, load_base, load_classifier
from align.models.roles import Roles
from align.planning.live_bytes import watch_live_bytes
from align.planning.memory import Workload, build_full_rows
from align.ppo.experience import Estimator, assemble_experience, compute_estimates
from align.ppo.update import Losses, accumulate_gradients, take_gradient_step
from align.ppo.workers import build_roles
from align.rollout.hf import HfEngine
from align.run import Base


def measure_update(base: Base, work: Workload, device: torch.device) -> dict[str, int]:
    """Run two PPO updates of the worst-case workload and return the peak bytes of live tensors in each phase of the
    second. By then the optimiser's moments exist.

    Args:
        work: the workload, run on the weights of `base` with new adapters.
    """
    torch.manual_seed(0)
    dtype = DTYPES[work.dtype]
    with tempfile.TemporaryDirectory() as folder:
        # Random adapters stand in for the supervised adapter and the reward model.
        adapters = [("init", load_base)] if work.from_adapter else []
        adapters += [("reward", load_classifier)] if work.rewards else []
        for name, load in adapters:
            model = load(base, choose_frozen_method(work.method), device, dtype)
            save_adapter(add_new_adapter(model, work.lora, name == "reward"), Path(folder, name), base)
        roles = build_roles(
            base,
            Path(folder, "init") if work.from_adapter else None,
            [Path(folder, "reward")] * work.rewards,
            method=work.method,
            frozen_method=choose_frozen_method(work.method),
            fresh=work.lora,
            value_backbone=work.value_backbone,
            device=device,
            dtype=dtype,
            seed=0,
        )
    if work.recompute:
        roles.enable_gradient_checkpointing()
    optimiser = torch.optim.AdamW([{"params": roles.parameters_of(role)} for role in roles.trainable], lr=0.0)
    engine = HfEngine((), 0, work.answer, 1.0, work.rollout_rows)
    counts: dict[str, int] = {}
    with watch_live_bytes(device, roles.model, roles.policy, roles.value_head, *roles.score_heads) as lap:
        for _ in range(2):
            counts = measure_phases(roles, optimiser, engine, work, lap)
    return counts


def measure_phases(
    roles: Roles, optimiser: torch.optim.Optimizer, engine: HfEngine, work: Workload, lap: Callable[[], int]
) -> dict[str, int]:
    """Run one PPO update on rows of maximum length, and return the peak bytes of live tensors by phase."""
    lap()
    counts: dict[str, int] = {}
    rows = work.micro_batch * (2 if work.accumulates else 1)
    prompts = build_full_rows(max(work.rollout_rows, rows), work.prompt)
    rollout = engine.generate(prompts, roles.actor("policy"), range(len(prompts)))
    counts["rollout"] = lap()
    rollout = rollout.rows(torch.arange(rows, device=rollout.tokens_BS.device))
    with torch.no_grad():
        scores = rollout.ended_B.float()
        for member in range(work.rewards):
            scores = compute_in_chunks(partial(roles.scores, member=member), rollout, work.micro_batch)
    minibatches = 1 if work.one_pass else 2
    estimates, cached = compute_estimates(
        roles, rollout, temperature=1.0, micro_batch=work.micro_batch, minibatches=minibatches
    )
    estimator = Estimator("gae" if "value" in roles.trainable else "reinforce_pp")
    batch, _ = assemble_experience(
        rollout, scores, *estimates, estimator=estimator, kl_coef=0.05, kl_in_reward=True, kl_estimator="k1"
    )
    counts["estimate"] = lap()
    accumulate_gradients(roles, batch, cached, micro_batch=work.micro_batch, temperature=1.0, losses=Losses())
    counts["update"] = lap()
    take_gradient_step(roles, optimiser, 1.0)
    counts["optimiser"] = lap()
    return counts
