"""Faster forwards on a CPU, which compute the same as transformers' and PEFT's modules with fewer operations.

`install_fast_path` replaces `forward` of module instances. The new forward calls the original one for cases that it
does not support. docs/decisions.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from align.models.fastpath.linear import (
    install_adapter_check,
    is_linear,
    is_lora,
    linear_forward,
    lora_forward,
)
from align.models.fastpath.llama import is_llama, llama_forward
from align.models.forward import get_route

__all__ = ["disable_fast_path", "install_fast_path", "restore_original_forwards"]


def install_fast_path(model: nn.Module) -> None:
    """Replace the forward of a model's linear layers, plain LoRA layers and Llama-like decoder by faster ones on a CPU.

    It also applies to adapters that are added later. A decoder on the plain path keeps its forward, and so does a model
    on a GPU, for which the fast path was not measured. On every path a LoRA layer raises an error for an adapter that
    the model does not have.
    """
    for module in filter(is_lora, model.modules()):
        install_adapter_check(module, model.peft_config)  # pyright: ignore[reportArgumentType]
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    forwards = [(is_linear, linear_forward), (is_lora, lora_forward)]
    if get_route(model).has_fast_path:
        forwards.append((is_llama, llama_forward))
    for module in model.modules():
        for covers, forward in forwards:
            if covers(module):
                module.forward = MethodType(forward, module)


@contextmanager
def disable_fast_path(*models: nn.Module | None) -> Iterator[None]:
    """Run the `with` block with the models' original forwards, and put the fast forwards back afterwards."""
    removed = [pair for model in models if model is not None for pair in restore_original_forwards(model)]
    try:
        yield
    finally:
        for module, forward in removed:
            module.forward = forward


def restore_original_forwards(model: nn.Module) -> list[tuple[nn.Module, MethodType]]:
    """Restore the original forwards of a model, and return the changed modules with the fast forwards that were
    removed."""
    ours = {linear_forward, lora_forward, llama_forward}
    replaced = [m for m in model.modules() if getattr(vars(m).get("forward"), "__func__", None) in ours]
    return [(module, vars(module).pop("forward")) for module in replaced]
