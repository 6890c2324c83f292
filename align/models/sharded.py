"""Sharding of a model's weights over W ranks by torch's FSDP2. Weights, gradients and optimiser moments take 1/W of the
memory on each rank. The files are the same as those of one process.

Forward, backward, gathering and scattering are collective operations: every rank must call them.
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
from align.models.cpu_memory import limit_kernel_cache
from align.models.fastpath import restore_original_forwards
from align.models.forward import get_route
from align.models.load import build_skeleton, load_base
from align.run import Base


def load_in_shards(base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a base model with its weights sharded over all ranks, on `device`. The first rank reads them into main
    memory; the other ranks hold only their shards and one tensor at a time.

    Raises:
        CorruptFile, InputError: see `align.models.load.load_base` and `shard_model`.
    """
    model = load_base(base, "full", torch.device("cpu"), dtype) if ranks.is_main() else None
    tensors = dict(iter_tensors(model)) if model else {}
    dtypes = ranks.broadcast({name: value.dtype for name, value in tensors.items()})
    model = shard_model(model or build_uninitialised(base, dtypes), device)
    scatter_tensors(model, tensors)
    return model


def build_uninitialised(base: Base, dtypes: Mapping[str, torch.dtype]) -> Any:
    """Build a base model for `method=full` with uninitialised weights, whose memory is only reserved, instead of
    loading them.

    Args:
        dtypes: name → dtype of the weights and buffers.

    Raises:
        InputError: the base cannot be built, or has other weights.
    """
    limit_kernel_cache()
    model = build_skeleton(base)
    tensors = {} if model is None else dict(iter_tensors(model))
    if model is None or tensors.keys() != dtypes.keys():
        problem = f"its modules cannot be built without its weights ({sorted(tensors.keys() ^ dtypes.keys())[:3]})"
        raise InputError("model.path", base.id, problem, "Train it on one GPU, or use method=lora.")
    for name, value in tensors.items():
        value.data = value.data.to(dtypes[name])
    model.to_empty(device="cpu")
    model.tie_weights()
    return model.requires_grad_(True).eval()


def iter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and tensor of all parameters and buffers of a model, including buffers that are not saved."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def scatter_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the first rank's tensors into a sharded model, so that each rank has its shards, and empty `tensors` to save
    memory.

    Args:
        model: the sharded model, whose tensors are overwritten.
        tensors: name → tensor on the first rank; empty on the others. Each is freed after it was sent.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, target in iter_tensors(model):
        if tensors:
            full = tensors.pop(name).to(target.device)
        else:
            full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
        else:
            dist.broadcast(full, src=0)
            target.copy_(full)


def shard_model(model: Any, device: torch.device) -> Any:
    """Shard a model's weights over all ranks with FSDP2, in place on `device`, and return it.

    A forward gathers the weights of one layer at a time. It must be a forward of the whole model.

    Raises:
        InputError: the model allows no padding. It would run a pass for each length, and ranks differ in their number.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    route = get_route(model)
    problem = f"type {model.config.model_type} takes no padding, by which ranks would keep in step"
    require(route.can_pad, "devices", ranks.world_size(), problem, "Train it on one GPU, or use method=lora.")
    # The fast path reads weights of layers without calling their forward, which would gather them.
    restore_original_forwards(model)
    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    for part in (*iter_largest_stack(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in model.modules():
        if isinstance(part, FSDPModule):  # gradients are summed, because each rank's loss is its share of the total
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    model.align_route = Route(False, route.can_pad, route.can_pack, "its weights are in shards")
    model.align_sharded = True
    return model


def iter_largest_stack(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of the `ModuleList` in a model that has the most parameters; nothing without a `ModuleList`."""
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    yield from max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=())


def is_sharded(model: Any) -> bool:
    """Return whether a model's weights were sharded by `shard_model`."""
    return "align_sharded" in vars(model)


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """Collect the full weights of a sharded model by name on the CPU of the first rank; other ranks get None for each.
    Tied weights are listed only under the first name."""
    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return gather_tensors({name: value for name, value in model.state_dict().items() if name not in tied})


def gather_tensors(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a mapping with full tensors on the CPU of the first rank, and None on other ranks, instead of
    sharded tensors."""
    gathered = dict(values)
    for name, value in values.items():
        if hasattr(value, "full_tensor"):
            full = value.detach().full_tensor()
            gathered[name] = full.cpu() if ranks.is_main() else None
    return gathered


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor in the same way as the tensor `like`, or return it unchanged if `like` is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_unsharded_weights(model: nn.Module, folder: Path) -> None:
    """Load the full weights from the safetensors files in a folder into a sharded model, in place."""
    targets = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            targets[name].copy_(shard_like(value.to(targets[name].dtype), targets[name]))


def save_full_model(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Save a model in `dtype` with `save_pretrained`; the full weights of a sharded model are gathered and written by
    the first rank."""
    if not is_sharded(model):
        model.to(dtype).save_pretrained(str(folder))
        return
    weights = gather_weights(model)
    if ranks.is_main():
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
        model.config.dtype = dtype
        model.save_pretrained(str(folder), state_dict=cast)


def gather_optimiser(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state with full tensors on the CPU of the first rank instead of sharded ones, for a
    checkpoint. Other ranks get None for each."""
    return {**state, "state": {number: gather_tensors(moments) for number, moments in state["state"].items()}}


def shard_optimiser(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimiser's full state, as one process saved it, with its tensors sharded like the parameters.

    Args:
        parameters: the optimiser's parameters in order.
    """
    sharded = {
        number: {name: shard_like(value, parameters[number]) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": sharded}
