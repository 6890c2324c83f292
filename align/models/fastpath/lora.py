"""LoRA layers with as few operations as LoRA has.

PEFT's forward is made for every variant there is: in bf16 it casts the input of each layer to the adapter's fp32,
scales in a pass, adds in a pass, and casts back. Here the low-rank product is taken in the dtype of the input and added
by the product itself. The adapter stays in fp32; its gradient arrives there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from peft.tuners.lora import Linear, Linear4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from align.core.errors import InputError


def is_lora(module: nn.Module) -> bool:
    return type(module) in (Linear, Linear4bit) and not getattr(module, "fan_in_fan_out", False)


def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + Σ s · B A x over the active adapters."""
    active = active_on(self)
    # In fp16 the adapter's gradient would be too small for its dtype: PEFT's way takes it in fp32.
    half = x.dtype == torch.float16 and torch.is_grad_enabled()
    if args or kwargs or half or active is None:
        return type(self).forward(self, x, *args, **kwargs)
    result = self.base_layer(x)
    for name in active:
        a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(result.dtype)
        low = linear(x, a).to(result.dtype).flatten(0, -2)
        flat = result.flatten(0, -2)
        if torch.is_grad_enabled():
            flat = torch.addmm(flat, low, b.t(), alpha=self.scaling[name])
        else:
            flat.addmm_(low, b.t(), alpha=self.scaling[name])
        result = flat.view_as(result)
    return result


def refuse_unknown(layer: Any, known: Collection[str]) -> None:
    """Let a layer check the adapters in force before each forward, PEFT's own or another.

    Args:
        known: the model's `peft_config`, which grows and shrinks with it. Not every adapter is on every layer.
    """
    if "known_adapters" not in vars(layer):
        layer.register_forward_pre_hook(check_active)
    layer.known_adapters = known


def check_active(layer: Any, inputs: Any = None) -> None:
    """Raises: InputError: see `require_known`."""
    known = vars(layer).get("known_adapters")
    if known is not None and not (layer.merged or layer.disable_adapters):
        require_known(layer.active_adapters, known)


def require_known(names: Iterable[str], known: Collection[str]) -> None:
    """Raises: InputError: an adapter is asked for that the model does not have. PEFT's layers pass over its name, and
    the base would answer in its place."""
    for name in names:
        if name not in known:
            problem = f"the model has no adapter of this name, only {', '.join(sorted(known)) or 'its base'}"
            raise InputError("adapter", name, problem, "Name one of these, or attach it to the model first.")


def active_on(layer: Any) -> list[str] | None:
    """The adapters in force on a layer; None where one of them is more than LoRA, or is merged into the weight.

    Raises:
        InputError: see `require_known`.
    """
    if layer.merged:
        return None
    if layer.disable_adapters:
        return []
    check_active(layer)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return active if all(is_plain(layer, name) for name in active) else None


def is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter of a layer is LoRA and nothing more: no variant, no bias, no dropout in force."""
    dropout = layer.lora_dropout[name]
    dropped = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
    return name not in layer.lora_variant and layer.lora_B[name].bias is None and not dropped
