"""Checkpoints of a PPO run: the trained weights, the optimiser's moments and a few numbers.

The rest of a run's state is a function of the update's number: each random draw has a generator with a seed for its
place, the schedule and the prompts depend on the number, and an ensemble's scales are computed from samples of the
reference, which are the same again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from align.core.errors import CorruptFile
from align.core.files import read_text
from align.models.finite_checks import require_finite_tensors
from align.models.roles import TRAINABLE, Roles
from align.ops.moments import Moments
from align.run import write_json

TENSORS = "state.safetensors"
NUMBERS = "state.json"


@dataclass(frozen=True, slots=True)
class Best:
    """The policy with the highest objective on held-out prompts so far: its update, objective and weights.

    Attributes:
        update: number of updates before it.
        objective: its mean held-out score less `kl_coef` times its KL.
        weights: its trained tensors, in the order of the policy's parameters, on the CPU.
    """

    update: int
    objective: float
    weights: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class PpoState:
    """The numbers and weights that a PPO run needs besides its model and optimiser to continue between two updates.

    Attributes:
        kl_coef: the KL coefficient of the next update.
        moments: the moments of the raw scores so far.
        strikes: tripwire → number of consecutive updates that have crossed it.
        best: the best policy so far; None before the first held-out evaluation.
        sampler: the policy's weights that sample the next update's answers, in the order of its parameters; empty for
            the present ones.
        start_variety: how much the start's greedy answers to held-out prompts differ; empty if that is not measured.
    """

    kl_coef: float
    moments: Moments
    strikes: Mapping[str, int] = field(default_factory=dict)
    best: Best | None = None
    sampler: tuple[Tensor, ...] = ()
    start_variety: Mapping[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Return the state without its tensors as a dictionary for JSON, which keeps a float to the bit."""
        best = {"update": self.best.update, "objective": self.best.objective} if self.best else None
        return {
            "kl_coef": self.kl_coef,
            "moments": asdict(self.moments),
            "strikes": dict(self.strikes),
            "best": best,
            "start_variety": dict(self.start_variety),
        }

    @classmethod
    def from_numbers(
        cls, numbers: Mapping[str, Any], best: tuple[Tensor, ...], sampler: tuple[Tensor, ...] = ()
    ) -> PpoState:
        """Rebuild the state from the dictionary of `numbers`, the weights of the best policy and those of the
        sampler."""
        best_policy = Best(**numbers["best"], weights=best) if numbers["best"] else None
        moments = Moments(**numbers["moments"])
        return cls(numbers["kl_coef"], moments, numbers["strikes"], best_policy, sampler, numbers["start_variety"])


def save_state(folder: Path, roles: Roles, optimiser: Optimizer, state: PpoState) -> None:
    """Write a PPO checkpoint to `state.safetensors` (weights and moments) and `state.json` (numbers) in `folder`."""
    best = {f"best.{i}": t for i, t in enumerate(state.best.weights)} if state.best else {}
    sampler = {f"sampler.{i}": t for i, t in enumerate(state.sampler)}
    tensors = {**collect_trained_weights(roles), **collect_optimiser_tensors(optimiser), **best, **sampler}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
    write_json(folder / NUMBERS, state.numbers())


def restore_state(folder: Path, roles: Roles, optimiser: Optimizer) -> PpoState:
    """Load a checkpoint's weights into the roles and its moments into the optimiser, in place, and return the rest of
    the state.

    Raises:
        CorruptFile: the files cannot be read, hold values that are not finite, or belong to another run.
    """
    try:
        tensors = load_file(folder / TENSORS)
        numbers = json.loads(read_text(folder / NUMBERS, NUMBERS))
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptFile(
            "checkpoint", str(folder), f"cannot be read ({str(error)[:120]})", "Remove it and run again."
        ) from error
    require_finite_tensors(tensors.items(), "checkpoint", str(folder), "Remove it and run the same command again.")
    parameters = collect_trained_weights(roles)
    if missing := sorted(parameters.keys() ^ {n for n in tensors if n.partition(".")[0] in TRAINABLE}):
        raise CorruptFile(
            "checkpoint", str(folder), f"is of another run ({missing[0]})", "Remove it and run the command again."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    optimiser_state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            optimiser_state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": optimiser_state, "param_groups": optimiser.state_dict()["param_groups"]})

    def collect_numbered(name: str) -> tuple[Tensor, ...]:
        count = sum(n.startswith(f"{name}.") for n in tensors)
        return tuple(tensors[f"{name}.{i}"] for i in range(count))

    return PpoState.from_numbers(numbers, collect_numbered("best"), collect_numbered("sampler"))


def collect_trained_weights(roles: Roles) -> dict[str, Tensor]:
    """Return all trained parameters as `ROLE.INDEX` → parameter."""
    return {f"{role}.{i}": p for role in roles.trainable for i, p in enumerate(roles.parameters_of(role))}


def collect_optimiser_tensors(optimiser: Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state tensors, such as Adam's moments, as `optimiser.INDEX.NAME` → tensor."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{index}.{key}": tensor for index, values in state.items() for key, tensor in values.items()}
