"""The fast path: what transformers and PEFT compute, from the same modules and weights, in fewer operations on a CPU.

`use_fast_path` gives instances of their modules another `forward`, which hands back to the original whatever it does
not cover. docs/decisions.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from align.models.fastpath import linear, llama, lora
from align.models.plain_path import route_of

__all__ = ["leave_fast_path", "use_fast_path", "without_fast_path"]


def use_fast_path(model: nn.Module) -> None:
    """Give every linear layer of a model, every plain LoRA layer, and a Llama-like decoder in it, the fast forward.
    Adapters that come later are served too. The decoder of a model on the plain path stays as it is, and so does a
    model on another device than a CPU: nobody has measured the fast path there. On every path a LoRA layer refuses an
    adapter that the model does not have."""
    for module in filter(lora.is_lora, model.modules()):
        lora.refuse_unknown(module, model.peft_config)  # pyright: ignore[reportArgumentType]
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    kinds = [(linear, linear.is_linear), (lora, lora.is_lora)]
    if route_of(model).fast:
        kinds.append((llama, llama.is_llama))
    for module in model.modules():
        for kind, served in kinds:
            if served(module):
                module.forward = MethodType(kind.forward, module)


@contextmanager
def without_fast_path(*models: nn.Module | None) -> Iterator[None]:
    """With the forwards that these models came with."""
    taken = [one for model in models if model is not None for one in leave_fast_path(model)]
    try:
        yield
    finally:
        for module, forward in taken:
            module.forward = forward


def leave_fast_path(model: nn.Module) -> list[tuple[nn.Module, MethodType]]:
    """Give a model the forwards that it came with; returns those that it had."""
    ours = {linear.forward, lora.forward, llama.forward}
    replaced = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", None) in ours]
    return [(module, vars(module).pop("forward")) for module in replaced]
