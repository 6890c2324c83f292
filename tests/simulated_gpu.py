"""A simulated GPU: tensors that report the device `cuda:0` and are computed on the CPU.

An operation on tensors of the card and of the host that CUDA refuses is refused here too, with torch's message. Unlike
torch's fake tensors these have values, so that `.item()`, boolean indices and complete stages work.

It does not simulate kernels, streams, memory, or the last bits of a sum.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

CARD = torch.device("cuda:0")
"""The device that a tensor of the card reports."""
INSIDE = torch.device("lazy:0")
"""The device of these tensors in torch's C++. A build for CPUs has autograd for this device, and ends the process if it
meets CUDA's."""
THERE = (CARD.type, INSIDE.type)
aten: Any = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default, aten._pin_memory.default}
"""Operations that may read from one device and write to the other."""
BY_INDEX = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
"""Operations whose indices may be on the host, whichever device holds the indexed tensor."""


def wide_addmm(x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(torch.addmm(x.to(out_dtype), a.to(out_dtype), b.to(out_dtype)))


FOR_CUDA_ALONE = {aten.addmm.dtype_out: wide_addmm}
"""Replacements for operations that have no kernel for CPUs."""


class MixedDevices(RuntimeError):
    """An operation that CUDA would refuse because of its tensors' devices."""


class OnCard(Tensor):
    """A tensor of the simulated card.

    Attributes:
        cpu_tensor: its values, as a tensor on the CPU.
    """

    cpu_tensor: Tensor

    @staticmethod
    def __new__(cls, cpu_tensor: Tensor) -> OnCard:
        tensor: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            cpu_tensor.size(),
            strides=cpu_tensor.stride(),
            storage_offset=cpu_tensor.storage_offset(),
            dtype=cpu_tensor.dtype,
            layout=cpu_tensor.layout,
            device=INSIDE,
            requires_grad=cpu_tensor.requires_grad,
        )
        tensor.cpu_tensor = cpu_tensor.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute_on_cpu(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return CARD

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        assert isinstance(new, OnCard), "a tensor of the card gets values of the host"
        Tensor.data.__set__(self, new)  # pyright: ignore[reportAttributeAccessIssue]
        self.cpu_tensor = new.cpu_tensor

    def tolist(self) -> Any:
        return self.cpu_tensor.tolist()

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"on the card: {self.cpu_tensor}"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        return self.cpu_tensor.untyped_storage()

    def data_ptr(self) -> int:
        return self.cpu_tensor.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OnCard, (self.cpu_tensor,)

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            copied = OnCard(self.cpu_tensor.clone()).requires_grad_(self.requires_grad)
            copied.__dict__.update({k: v for k, v in vars(self).items() if k != "cpu_tensor"})
            memo[id(self)] = copied
        return memo[id(self)]


class Codes(OnCard, Params4bit):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """An NF4 weight with its quantisation state. It cannot be moved to another device."""

    def detach(self) -> Codes:
        detached = Codes(self.cpu_tensor)
        vars(detached).update(vars(self))
        return detached

    def to(self, *args: Any, **kwargs: Any) -> Codes:
        return self


class Card(TorchDispatchMode):
    """A mode that creates tensors of the card if the device is `cuda`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute_on_cpu(func, args, kwargs or {})


class DeviceReplacement(TorchFunctionMode):
    """A mode that passes the device `INSIDE` to torch's C++ in place of `cuda`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.new_tensor):
            args = tuple(replace_cuda_device(a) for a in args)
        if func is Tensor.cuda:
            return args[0].to(INSIDE)
        options = {k: replace_cuda_device(v) if k == "device" else v for k, v in (kwargs or {}).items()}
        return func(*args, **options)


def replace_cuda_device(device: Any) -> Any:
    """Replace a CUDA device by `INSIDE`, the device that torch's C++ gets for it."""
    return INSIDE if isinstance(device, str | torch.device) and torch.device(device).type == "cuda" else device


def compute_on_cpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU tensors of the arguments. The result is on the card if CUDA would leave it there."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    card_tensors = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    device = kwargs.get("device")
    target = torch.device(device) if device is not None else None
    if card_tensors and func not in ACROSS:
        refuse_mixed(func, args, tensors)
    is_result_on_card = target.type in THERE if target is not None else bool(card_tensors)
    if func is aten._pin_memory.default:
        return args[0].clone()
    inner, options = tree_map_only(OnCard, lambda t: t.cpu_tensor, (args, kwargs))
    if target is not None and target.type in THERE:
        options = {**options, "device": torch.device("cpu")}
        if options.get("pin_memory"):
            options.pop("pin_memory")
    if func is aten._to_copy.default:
        options.pop("non_blocking", None)
    out = FOR_CUDA_ALONE.get(func, func)(*inner, **options)
    if func is aten._local_scalar_dense.default:
        return out
    if func._schema.is_mutable:
        return restore_argument_tensors(func, args, kwargs, out)
    return tree_map_only(Tensor, OnCard, out) if is_result_on_card else out


def restore_argument_tensors(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Return the result of an operation in place, with the argument tensors themselves where it returns them."""
    positions = {a.name: i for i, a in enumerate(func._schema.arguments)}
    values = {
        name: kwargs[name] if name in kwargs else args[i]
        for name, i in positions.items()
        if name in kwargs or i < len(args)
    }
    tensors_by_id = {
        id(v.cpu_tensor if isinstance(v, OnCard) else v): v for v in tree_leaves(values) if isinstance(v, Tensor)
    }
    for tensor in tensors_by_id.values():
        has_same_shape = not isinstance(tensor, OnCard) or tensor.cpu_tensor.shape == tensor.shape
        assert has_same_shape, f"{func} changes a shape in place, which the pretended card cannot"
    has_card_tensor = any(isinstance(v, OnCard) for v in tensors_by_id.values())
    to_argument: Callable[[Tensor], Tensor] = lambda t: tensors_by_id.get(id(t), OnCard(t) if has_card_tensor else t)  # noqa: E731
    return tree_map_only(Tensor, to_argument, out)


def refuse_mixed(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise MixedDevices if tensors of both devices meet, except for scalars and indices on the host."""
    allowed: list[Tensor] = []
    if func in BY_INDEX and isinstance(args[0], OnCard):
        allowed = [index for index in args[1] if isinstance(index, Tensor)]
    host = [t for t in tensors if not isinstance(t, OnCard) and not any(t is each for each in allowed)]
    first = tensors[0]
    if any(t.dim() > 0 for t in host) or (host and func._schema.is_mutable and not isinstance(first, OnCard)):
        raise MixedDevices(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


def move_to_card(module: Any) -> Any:
    """Move the weights of a module to the card, in place. Tied weights stay tied."""
    parameters_by_id: dict[int, Any] = {}
    for owner in module.modules():
        for name, tensor in owner._parameters.items():
            if tensor is not None:
                if id(tensor) not in parameters_by_id:
                    parameters_by_id[id(tensor)] = copy_parameter_to_card(tensor)
                owner._parameters[name] = parameters_by_id[id(tensor)]
        for name, tensor in owner._buffers.items():
            owner._buffers[name] = None if tensor is None else OnCard(tensor)
    return module


def copy_parameter_to_card(parameter: Any) -> Any:
    """Copy a parameter to the card, with the quantisation state if it is in NF4."""
    values = parameter.detach().as_subclass(Tensor)
    is_nf4 = isinstance(parameter, Params4bit)
    copy_on_card: Any = Codes(values) if is_nf4 else torch.nn.Parameter(OnCard(values), parameter.requires_grad)
    vars(copy_on_card).update(vars(parameter))
    if (state := getattr(parameter, "quant_state", None)) is not None:
        copy_on_card.quant_state = copy.copy(state)
        copy_on_card.quant_state.state2 = copy.copy(state.state2)
        copy_on_card.quant_state.to(CARD)
    return copy_on_card


def load_model_to_card(load: Any, *args: Any, device_map: Any = None, **options: Any) -> Any:
    """Load a model with transformers on the CPU, then move it to the card. Transformers loads in threads, where the
    modes are not active."""
    output = load(*args, device_map={"": "cpu"}, **options)
    if device_map is None or torch.device(device_map[""]).type == "cpu":
        return output
    model, extras = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
    return (move_to_card(model), *extras) if extras else move_to_card(model)


@contextmanager
def simulate_card() -> Iterator[MutableMapping[str, str]]:
    """Simulate a CUDA device for as long as the block lasts. Yields the environment, which is restored at the end."""
    lifts = torch._C._only_lift_cpu_tensors  # pyright: ignore
    set_lifts = torch._C._set_only_lift_cpu_tensors  # pyright: ignore
    cuda_functions: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "set_device": lambda d: None,
        "is_bf16_supported": lambda *a, **k: True,
        "synchronize": lambda *a: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *a: (1 << 34, 1 << 34),
        "get_device_name": lambda *a: "a pretended card",
        "get_device_capability": lambda *a: (8, 0),
        "max_memory_allocated": lambda *a: 1 << 20,
        "memory_allocated": lambda *a: 1 << 20,
        "max_memory_reserved": lambda *a: 1 << 20,
        "memory_reserved": lambda *a: 1 << 20,
        "reset_peak_memory_stats": lambda *a: None,
        "get_rng_state": lambda *a: torch.get_rng_state(),
        "set_rng_state": lambda *a: None,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda *a: None,
        "manual_seed": lambda *a: None,
        "manual_seed_all": lambda *a: None,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "get_device_properties": lambda *a: SimpleNamespace(
            major=8,
            minor=0,
            total_memory=1 << 34,
            name="a pretended card",
            multi_processor_count=1,
        ),
    }
    with ExitStack() as stack:
        for name, function in cuda_functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for name in ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"):
            stack.enter_context(mock.patch.object(torch.cuda.random, name, cuda_functions[name]))
        stack.enter_context(mock.patch.dict(os.environ))
        load = PreTrainedModel.from_pretrained.__func__
        load_to_card = classmethod(
            lambda cls, *args, **options: load_model_to_card(partial(load, cls), *args, **options)
        )
        stack.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", load_to_card))
        stack.callback(set_lifts, lifts())
        set_lifts(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        torch.__future__.set_swap_module_params_on_conversion(True)  # `.to` changes the class of a parameter
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Card())
        stack.enter_context(DeviceReplacement())
        yield os.environ
