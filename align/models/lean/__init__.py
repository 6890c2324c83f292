"""The short ways: what transformers and PEFT compute, from the same modules and weights, in fewer operations.

`make_lean` gives instances of their modules another `forward`, which hands back to the original whatever is not plain.
docs/decisions.md has the figures.
"""

from __future__ import annotations

from types import MethodType

from torch import nn

from align.models.lean import linear, llama, lora

__all__ = ["make_lean"]


def make_lean(model: nn.Module) -> None:
    """Give every linear layer of a model, every plain LoRA layer, and a Llama-like decoder in it, the short forward.
    Adapters that come later are served too."""
    for module in model.modules():
        for kind, served in ((linear, linear.is_linear), (lora, lora.is_lora), (llama, llama.is_llama)):
            if served(module):
                module.forward = MethodType(kind.forward, module)
