"""Every weight of a model in shards, one on each of W ranks, by torch's FSDP2: weights, gradients and moments take a
W-th of the memory. The files are those of one process.

A forward, a backward and what gathers or spreads weights are work of all ranks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from align import ranks
from align.core.errors import InputError, require
from align.models.architectures import Route
from align.models.fastpath import leave_fast_path
from align.models.load import load_base, skeleton
from align.models.memory import keep_few_kernels
from align.models.plain_path import route_of
from align.run import Base

WHY = "its weights are in shards"


def load_in_shards(base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    """A base whose weights are in shards on `device`. The first rank reads them, into its main memory; the others hold
    no more than their shards and one tensor at a time.

    Raises: see `align.models.load.load_base` and `in_shards`.
    """
    model = load_base(base, "full", torch.device("cpu"), dtype) if ranks.is_main() else None
    whole = dict(named_tensors(model)) if model else {}
    dtypes = ranks.broadcast({name: value.dtype for name, value in whole.items()})
    model = in_shards(model or without_weights(base, dtypes), device)
    spread(model, whole)
    return model


def without_weights(base: Base, dtypes: Mapping[str, torch.dtype]) -> Any:
    """A base for `method=full` as `load_base` gives it, but with room for its weights where those would be. Nothing is
    written there, so that the room takes no memory yet.

    Args:
        dtypes: of its weights and buffers, by name.

    Raises:
        InputError: it cannot be built, or has other weights.
    """
    keep_few_kernels()
    model = skeleton(base)
    held = {} if model is None else dict(named_tensors(model))
    if model is None or held.keys() != dtypes.keys():
        problem = f"its modules cannot be built without its weights ({sorted(held.keys() ^ dtypes.keys())[:3]})"
        raise InputError("model.path", base.id, problem, "Train it on one GPU, or use method=lora.")
    for name, value in held.items():
        value.data = value.data.to(dtypes[name])
    model.to_empty(device="cpu")
    model.tie_weights()
    return model.requires_grad_(True).eval()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers, those among them that no file has."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def spread(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Give every rank its shards of what the first one holds.

    Args:
        whole: of the first rank, by name; each is let go of once it is spread.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, own in named_tensors(model):
        given = whole.pop(name).to(own.device) if whole else torch.empty(own.shape, dtype=own.dtype, device=own.device)
        if isinstance(own, DTensor):
            own.copy_(distribute_tensor(given, own.device_mesh, own.placements))
        else:
            dist.broadcast(given, src=0)
            own.copy_(given)


def in_shards(model: Any, device: torch.device) -> Any:
    """The model itself, each of its weights in shards on `device` from here on.

    Layers are gathered one at a time, in a forward of the whole model: hidden states are not asked of a part of it.

    Raises:
        InputError: the model computes rows of one length together. Ranks would not take as many passes as each other.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    way = route_of(model)
    require(
        way.padding,
        "devices",
        ranks.world_size(),
        f"type {model.config.model_type} takes no padding, by which ranks would keep in step",
        "Train it on one GPU, or use method=lora.",
    )
    leave_fast_path(model)  # it reads weights of layers that it does not call
    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    for part in (*layers_of(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in model.modules():
        if isinstance(part, FSDPModule):  # gradients are sums over ranks, whose losses are shares of one
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    model.align_route = Route(False, way.padding, way.packing, WHY)
    model.align_sharded = True
    return model


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of the longest stack in a model, which are most of it."""
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    yield from max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=())


def is_sharded(model: Any) -> bool:
    """Whether `in_shards` has divided it."""
    return "align_sharded" in vars(model)


def weights(model: nn.Module) -> dict[str, Any]:
    """A model's weights by name, put together, on the CPU of the first rank; one that has two names under the first."""
    once = {name for name, _ in model.named_parameters()}
    other = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return put_together({name: value for name, value in model.state_dict().items() if name not in other})


def put_together(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, those in shards put together, on the CPU of the first rank."""
    return {name: whole(value) for name, value in tensors.items()}


def whole(value: Any) -> Any:
    """A tensor in shards, put together on the CPU of the first rank; anything else as it is."""
    if not hasattr(value, "full_tensor"):
        return value
    found = value.detach().full_tensor()
    return found.cpu() if ranks.is_main() else None


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor as one in shards, as `model` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> None:
    """Give a model in shards the weights that lie whole in a folder."""
    own = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            own[name].copy_(shard_like(value.to(own[name].dtype), own[name]))


def save_whole(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write a model's weights in `dtype`, in shards or not, as transformers does. The first rank writes."""
    if not is_sharded(model):
        model.to(dtype).save_pretrained(str(folder))
        return
    state = weights(model)
    if ranks.is_main():
        held = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        model.config.dtype = dtype
        model.save_pretrained(str(folder), state_dict=held)


def optimiser_whole(state: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimiser keeps, as one of one process would have kept it."""
    return {**state, "state": {number: put_together(kept) for number, kept in state["state"].items()}}


def optimiser_in_shards(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The same the other way round.

    Args:
        parameters: of the optimiser, in their order.
    """
    spread = {
        number: {name: shard_like(value, parameters[number]) for name, value in kept.items()}
        for number, kept in state["state"].items()
    }
    return {**state, "state": spread}
