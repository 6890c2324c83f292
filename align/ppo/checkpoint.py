"""All that an update of PPO leaves behind for the next: what trains, the optimiser's moments, a few numbers.

Nothing else has a history. Every draw comes from a generator seeded by its place, the schedule and the prompts are
functions of the update's number, and members of an ensemble are put on one scale by the reference's samples, which are
drawn again alike.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from align.errors import CorruptFile
from align.files import read_text
from align.models.finite import check_tensors
from align.models.roles import TRAINABLE, Roles
from align.ppo.state import State
from align.run import write_json

TENSORS, NUMBERS = "state.safetensors", "state.json"


def save(folder: Path, roles: Roles, optimiser: Optimizer, state: State) -> None:
    """Write all of a run between two updates into `folder`."""
    best = {f"best.{i}": t for i, t in enumerate(state.best.weights)} if state.best else {}
    sampler = {f"sampler.{i}": t for i, t in enumerate(state.sampler)}
    tensors = {**weights(roles), **optimiser_tensors(optimiser), **best, **sampler}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TENSORS)
    write_json(folder / NUMBERS, state.numbers())


def restore_state(folder: Path, roles: Roles, optimiser: Optimizer) -> State:
    """Put saved weights and moments back in place; returns the rest.

    Raises:
        CorruptFile: it is not the state of a run like this one, or not finite.
    """
    try:
        tensors = load_file(folder / TENSORS)
        numbers = json.loads(read_text(folder / NUMBERS, NUMBERS))
    except (OSError, ValueError, SafetensorError) as error:
        raise CorruptFile(
            "checkpoint", str(folder), f"cannot be read ({str(error)[:120]})", "Remove it and run again."
        ) from error
    check_tensors(tensors.items(), "checkpoint", str(folder), "Remove it and run the same command again.")
    own = weights(roles)
    if missing := sorted(own.keys() ^ {n for n in tensors if n.partition(".")[0] in TRAINABLE}):
        raise CorruptFile(
            "checkpoint", str(folder), f"is of another run ({missing[0]})", "Remove it and run the command again."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            kept.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict({"state": kept, "param_groups": optimiser.state_dict()["param_groups"]})

    def numbered(name: str) -> tuple[Tensor, ...]:
        count = sum(n.startswith(f"{name}.") for n in tensors)
        return tuple(tensors[f"{name}.{i}"] for i in range(count))

    return State.of(numbers, numbered("best"), numbered("sampler"))


def weights(roles: Roles) -> dict[str, Tensor]:
    """Everything that trains, by role and place."""
    return {f"{role}.{i}": p for role in roles.trainable for i, p in enumerate(roles.parameters_of(role))}


def optimiser_tensors(optimiser: Optimizer) -> dict[str, Tensor]:
    """The optimiser's own tensors, by parameter and name."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{index}.{key}": tensor for index, own in state.items() for key, tensor in own.items()}
