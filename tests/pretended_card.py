"""A graphics card that is none: tensors that say `cuda:0` and are computed on the CPU.

Where a tensor of the card meets one of the host, what CUDA refuses is refused here too, in the words of torch. Unlike
torch's fake tensors these have values, so that `.item()`, boolean indices and whole stages work.

What it cannot show: kernels, streams, memory, the last bits of a sum.
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

CARD, INSIDE = torch.device("cuda:0"), torch.device("lazy:0")
"""What a tensor of the card says of itself, and what torch's C++ believes: a build for CPUs has autograd for the
latter, and ends the process at the former."""
THERE = (CARD.type, INSIDE.type)
aten: Any = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default, aten._pin_memory.default}
"""What may read one device and write the other."""
BY_INDEX = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
}  # fmt: skip
"""Whose indices may lie on the host, whatever they index."""


def wide_addmm(x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(torch.addmm(x.to(out_dtype), a.to(out_dtype), b.to(out_dtype)))


FOR_CUDA_ALONE = {aten.addmm.dtype_out: wide_addmm}
"""What has no kernel for CPUs."""


class MixedDevices(RuntimeError):
    """What CUDA would refuse."""


class OnCard(Tensor):
    """A tensor of the card.

    Attributes:
        held: its values, on the CPU.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        made: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=INSIDE, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})

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
        self.held = new.held

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"on the card: {self.held}"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OnCard, (self.held,)

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            copied = OnCard(self.held.clone()).requires_grad_(self.requires_grad)
            copied.__dict__.update({k: v for k, v in vars(self).items() if k != "held"})
            memo[id(self)] = copied
        return memo[id(self)]


class Codes(OnCard, Params4bit):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """A weight in NF4, with what its codes stand for. It moves nowhere."""

    def detach(self) -> Codes:
        made = Codes(self.held)
        vars(made).update(vars(self))
        return made

    def to(self, *args: Any, **kwargs: Any) -> Codes:
        return self


class Card(TorchDispatchMode):
    """Makes what is asked for on `cuda` a tensor of the card."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Renamed(TorchFunctionMode):
    """Asks torch's C++ for the card by its other name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, Tensor.new_tensor):
            args = tuple(renamed(a) for a in args)
        if func is Tensor.cuda:
            return args[0].to(INSIDE)
        named = {k: renamed(v) if k == "device" else v for k, v in (kwargs or {}).items()}
        return func(*args, **named)


def renamed(device: Any) -> Any:
    """As torch's C++ is to be asked."""
    return INSIDE if isinstance(device, str | torch.device) and torch.device(device).type == "cuda" else device


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on what the tensors hold; its result on the card where CUDA would leave it there."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in given if isinstance(tensor, OnCard)]
    asked = kwargs.get("device")
    to = torch.device(asked) if asked is not None else None
    if there and func not in ACROSS:
        refuse_mixed(func, args, given)
    result_there = to.type in THERE if to is not None else bool(there)
    if func is aten._pin_memory.default:
        return args[0].clone()
    inner, options = tree_map_only(OnCard, lambda t: t.held, (args, kwargs))
    if to is not None and to.type in THERE:
        options = {**options, "device": torch.device("cpu")}
        if options.get("pin_memory"):
            options.pop("pin_memory")
    if func is aten._to_copy.default:
        options.pop("non_blocking", None)
    out = FOR_CUDA_ALONE.get(func, func)(*inner, **options)
    if func is aten._local_scalar_dense.default:
        return out
    if func._schema.is_mutable:
        return written(func, args, kwargs, out)
    return tree_map_only(Tensor, OnCard, out) if result_there else out


def written(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """What an operation in place gives back: the very tensors that it was given."""
    by_name = {a.name: i for i, a in enumerate(func._schema.arguments)}
    values = {name: kwargs[name] if name in kwargs else args[i] for name, i in by_name.items()
              if name in kwargs or i < len(args)}  # fmt: skip
    kept = {id(v.held if isinstance(v, OnCard) else v): v for v in tree_leaves(values) if isinstance(v, Tensor)}
    for tensor in kept.values():
        same = not isinstance(tensor, OnCard) or tensor.held.shape == tensor.shape
        assert same, f"{func} changes a shape in place, which the pretended card cannot"
    card = any(isinstance(v, OnCard) for v in kept.values())
    new: Callable[[Tensor], Tensor] = lambda t: kept.get(id(t), OnCard(t) if card else t)  # noqa: E731
    return tree_map_only(Tensor, new, out)


def refuse_mixed(func: Any, args: Any, given: list[Tensor]) -> None:
    """Raises: MixedDevices: tensors of both devices meet, and none of those of the host is a scalar or an index."""
    allowed: list[Tensor] = []
    if func in BY_INDEX and isinstance(args[0], OnCard):
        allowed = [index for index in args[1] if isinstance(index, Tensor)]
    host = [t for t in given if not isinstance(t, OnCard) and not any(t is each for each in allowed)]
    first = given[0]
    if any(t.dim() > 0 for t in host) or (host and func._schema.is_mutable and not isinstance(first, OnCard)):
        raise MixedDevices(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


def on_card(module: Any) -> Any:
    """A module with its weights on the card, in place; what is tied stays tied."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, given in owner._parameters.items():
            if given is not None:
                if id(given) not in made:
                    made[id(given)] = parameter_on_card(given)
                owner._parameters[name] = made[id(given)]
        for name, given in owner._buffers.items():
            owner._buffers[name] = None if given is None else OnCard(given)
    return module


def parameter_on_card(given: Any) -> Any:
    """A parameter, and of one in NF4 what its codes stand for."""
    held = given.detach().as_subclass(Tensor)
    codes = isinstance(given, Params4bit)
    made: Any = Codes(held) if codes else torch.nn.Parameter(OnCard(held), given.requires_grad)
    vars(made).update(vars(given))
    if (state := getattr(given, "quant_state", None)) is not None:
        made.quant_state = copy.copy(state)
        made.quant_state.state2 = copy.copy(state.state2)
        made.quant_state.to(CARD)
    return made


def loaded(load: Any, *args: Any, device_map: Any = None, **options: Any) -> Any:
    """What transformers loads, read by the CPU: it reads in threads, which know of no mode."""
    found = load(*args, device_map={"": "cpu"}, **options)
    if device_map is None or torch.device(device_map[""]).type == "cpu":
        return found
    model, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
    return (on_card(model), *rest) if rest else on_card(model)


@contextmanager
def pretended_card() -> Iterator[MutableMapping[str, str]]:
    """Inside, `cuda` is a device of this machine, as far as tensors tell. Gives the environment, which is put back."""
    lifts, set_lifts = torch._C._only_lift_cpu_tensors, torch._C._set_only_lift_cpu_tensors  # pyright: ignore
    says: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 2,
        "current_device": lambda: 0, "set_device": lambda d: None, "is_bf16_supported": lambda *a, **k: True,
        "synchronize": lambda *a: None, "empty_cache": lambda: None, "mem_get_info": lambda *a: (1 << 34, 1 << 34),
        "get_device_name": lambda *a: "a pretended card", "get_device_capability": lambda *a: (8, 0),
        "max_memory_allocated": lambda *a: 1 << 20, "memory_allocated": lambda *a: 1 << 20,
        "max_memory_reserved": lambda *a: 1 << 20, "memory_reserved": lambda *a: 1 << 20,
        "reset_peak_memory_stats": lambda *a: None, "get_rng_state": lambda *a: torch.get_rng_state(),
        "set_rng_state": lambda *a: None, "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda *a: None, "manual_seed": lambda *a: None, "manual_seed_all": lambda *a: None,
        "is_initialized": lambda: True, "_is_in_bad_fork": lambda: False,
        "get_device_properties": lambda *a: SimpleNamespace(
            major=8, minor=0, total_memory=1 << 34, name="a pretended card", multi_processor_count=1,
        ),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, answer in says.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        for name in ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"):
            stack.enter_context(mock.patch.object(torch.cuda.random, name, says[name]))
        stack.enter_context(mock.patch.dict(os.environ))
        load = PreTrainedModel.from_pretrained.__func__
        reads = classmethod(lambda cls, *args, **options: loaded(partial(load, cls), *args, **options))
        stack.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", reads))
        stack.callback(set_lifts, lifts())
        set_lifts(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        torch.__future__.set_swap_module_params_on_conversion(True)  # `.to` gives a parameter another class
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Card())
        stack.enter_context(Renamed())
        yield os.environ
