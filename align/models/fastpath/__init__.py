"""The fast path: what transformers and PEFT compute, from the same modules and weights, in fewer operations on a CPU.

`use_fast_path` gives instances of their modules another `forward`, which hands back to the original whatever it does
not cover. docs/decisions.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from align.models.fastpath.linear import (
    check_adapters_before_forward,
    is_linear,
    is_lora,
    linear_forward,
    lora_forward,
)
from align.models.fastpath.llama import is_llama, llama_forward
from align.models.forward import route_of

__all__ = ["leave_fast_path", "use_fast_path", "without_fast_path"]


def use_fast_path(model: nn.Module) -> None:
    """Give every linear layer of a model, every plain LoRA layer, and a Llama-like decoder in it, the fast forward.

    Adapters that are added later take it too. A decoder on the plain path keeps its forward, and so does a model that
    is not on a CPU, where the fast path was never measured. On every path a LoRA layer refuses an adapter that the
    model does not have.
    """
    for module in filter(is_lora, model.modules()):
        check_adapters_before_forward(module, model.peft_config)  # pyright: ignore[reportArgumentType]
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    forwards = [(is_linear, linear_forward), (is_lora, lora_forward)]
    if route_of(model).fast:
        forwards.append((is_llama, llama_forward))
    for module in model.modules():
        for covers, forward in forwards:
            if covers(module):
                module.forward = MethodType(forward, module)


@contextmanager
def without_fast_path(*models: nn.Module | None) -> Iterator[None]:
    """Restore the original forwards of models within the block."""
    removed = [pair for model in models if model is not None for pair in leave_fast_path(model)]
    try:
        yield
    finally:
        for module, forward in removed:
            module.forward = forward


def leave_fast_path(model: nn.Module) -> list[tuple[nn.Module, MethodType]]:
    """Restore the original forwards of a model. Returns the modules and the forwards that they had."""
    ours = {linear_forward, lora_forward, llama_forward}
    replaced = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", None) in ours]
    return [(module, vars(module).pop("forward")) for module in replaced]
