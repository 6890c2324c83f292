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
from align.models.cpu_memory import keep_few_kernels
from align.models.fastpath import leave_fast_path
from align.models.forward import route_of
from align.models.load import load_base, skeleton
from align.run import Base


def load_in_shards(base: Base, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a base whose weights are in shards on `device`. The first rank reads them, into its main memory; the others
    hold no more than their shards and one tensor at a time.

    Raises: see `align.models.load.load_base` and `shard`.
    """
    model = load_base(base, "full", torch.device("cpu"), dtype) if ranks.is_main() else None
    tensors = dict(named_tensors(model)) if model else {}
    dtypes = ranks.broadcast({name: value.dtype for name, value in tensors.items()})
    model = shard(model or build_empty(base, dtypes), device)
    scatter(model, tensors)
    return model


def build_empty(base: Base, dtypes: Mapping[str, torch.dtype]) -> Any:
    """Build a base for `method=full` as `load_base` returns it, with memory reserved for its weights. Nothing is
    written there, so that it takes none yet.

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
    """Yield weights and buffers, those among them that no file has too."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def scatter(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every rank its shards of the tensors of the first rank.

    Args:
        tensors: of the first rank, by name; each is freed once it is scattered.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, own in named_tensors(model):
        whole = (
            tensors.pop(name).to(own.device) if tensors else torch.empty(own.shape, dtype=own.dtype, device=own.device)
        )
        if isinstance(own, DTensor):
            own.copy_(distribute_tensor(whole, own.device_mesh, own.placements))
        else:
            dist.broadcast(whole, src=0)
            own.copy_(whole)


def shard(model: Any, device: torch.device) -> Any:
    """Return the model itself, each of its weights in shards on `device`.

    Layers are gathered one at a time, in a forward of the whole model; a part of it cannot be called alone.

    Raises:
        InputError: the model computes rows of one length together. Ranks would not take as many passes as each other.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    route = route_of(model)
    problem = f"type {model.config.model_type} takes no padding, by which ranks would keep in step"
    require(route.padding, "devices", ranks.world_size(), problem, "Train it on one GPU, or use method=lora.")
    leave_fast_path(model)  # it reads weights of layers that it does not call
    mesh = init_device_mesh(device.type, (ranks.world_size(),))
    for part in (*layers_of(model), model):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in model.modules():
        if isinstance(part, FSDPModule):  # gradients are sums over ranks, whose losses are shares of one
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    model.align_route = Route(False, route.padding, route.packing, "its weights are in shards")
    model.align_sharded = True
    return model


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of the largest stack in a model, which are most of it."""
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    yield from max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=())


def is_sharded(model: Any) -> bool:
    """Return whether `shard` has divided it."""
    return "align_sharded" in vars(model)


def gather_weights(model: nn.Module) -> dict[str, Any]:
    """Return a model's whole weights by name, on the CPU of the first rank; a tied one under its first name."""
    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return gather({name: value for name, value in model.state_dict().items() if name not in tied})


def gather(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by name, tensors in shards gathered on the CPU of the first rank."""
    gathered = dict(values)
    for name, value in values.items():
        if hasattr(value, "full_tensor"):
            whole = value.detach().full_tensor()
            gathered[name] = whole.cpu() if ranks.is_main() else None
    return gathered


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor in shards, as `model` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(model, DTensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> None:
    """Load the whole weights in a folder into a model in shards."""
    own = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(path).items():
            own[name].copy_(shard_like(value.to(own[name].dtype), own[name]))


def save_whole(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Write a model's weights in `dtype`, in shards or not, as transformers does. The first rank writes."""
    if not is_sharded(model):
        model.to(dtype).save_pretrained(str(folder))
        return
    weights = gather_weights(model)
    if ranks.is_main():
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
        model.config.dtype = dtype
        model.save_pretrained(str(folder), state_dict=cast)


def gather_optimiser(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state as that of one process."""
    return {**state, "state": {number: gather(moments) for number, moments in state["state"].items()}}


def shard_optimiser(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimiser's state of one process in shards.

    Args:
        parameters: of the optimiser, in their order.
    """
    sharded = {
        number: {name: shard_like(value, parameters[number]) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": sharded}
