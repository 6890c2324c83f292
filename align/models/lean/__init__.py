"""The short ways: what transformers and PEFT compute, from the same modules and weights, in fewer operations.

`make_lean` gives instances of their modules another `forward`, which hands back to the original whatever is not plain.
docs/decisions.md has the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

from torch import nn

from align.models.lean import linear, llama, lora
from align.models.plain import route_of

__all__ = ["make_lean", "plainly"]


def make_lean(model: nn.Module) -> None:
    """Give every linear layer of a model, every plain LoRA layer, and a Llama-like decoder in it, the short forward.
    Adapters that come later are served too. The decoder of a model on the plain path stays as it is."""
    kinds = [(linear, linear.is_linear), (lora, lora.is_lora)]
    if route_of(model).fast:
        kinds.append((llama, llama.is_llama))
    for module in model.modules():
        for kind, served in kinds:
            if served(module):
                module.forward = MethodType(kind.forward, module)


@contextmanager
def plainly(*models: nn.Module | None) -> Iterator[None]:
    """With the forwards that these models came with, in place of the short ones."""
    modules = (module for model in models if model is not None for module in model.modules())
    short = {linear.forward, lora.forward, llama.forward}
    lean = [module for module in modules if getattr(vars(module).get("forward"), "__func__", None) in short]
    taken = [(module, vars(module).pop("forward")) for module in lean]
    try:
        yield
    finally:
        for module, forward in taken:
            module.forward = forward
