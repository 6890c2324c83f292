"""Forwards of linear and LoRA layers with fewer operations.

In fp32 on a CPU a linear layer uses the faster library (`align.ops.linear`). PEFT's forward supports every variant of
LoRA: in bf16 it casts the input of each layer to the adapter's fp32, scales and adds in separate passes, and casts
back. Here the low-rank product is computed in the dtype of the input, and added by the matrix product itself. The
adapter and its gradient stay in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from peft.tuners.lora import Linear, Linear4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from align.core.errors import InputError
from align.models.fastpath.layers import Matrix, apply_matrices


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def linear_forward(self: Any, x: Tensor) -> Tensor:
    """Compute W x + b in place of `nn.Linear.forward`, in fp32 with the faster matrix library."""
    weight = self.weight
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
        return nn.Linear.forward(self, x)
    trained = weight if weight.requires_grad else None
    matrix = Matrix(weight.to, (self.out_features, self.in_features), self.bias, trained=trained)
    return apply_matrices(x.flatten(0, -2), (matrix,))[0].unflatten(0, x.shape[:-1])


def is_lora(module: nn.Module) -> bool:
    return type(module) in (Linear, Linear4bit) and not getattr(module, "fan_in_fan_out", False)


def lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute W x + Σ s · B A x over the active adapters in place of PEFT's forward, which is called for unsupported
    cases."""
    active = list_active_adapters(self)
    # In fp16 the adapter's gradient would underflow: PEFT's forward computes it in fp32.
    is_half = x.dtype == torch.float16 and torch.is_grad_enabled()
    if args or kwargs or is_half or active is None:
        return type(self).forward(self, x, *args, **kwargs)
    result = self.base_layer(x)
    for name in active:
        a = self.lora_A[name].weight.to(x.dtype)
        b = self.lora_B[name].weight.to(result.dtype)
        low = linear(x, a).to(result.dtype).flatten(0, -2)
        flat = result.flatten(0, -2)
        add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
        result = add(flat, low, b.t(), alpha=self.scaling[name]).view_as(result)
    return result


def install_adapter_check(layer: Any, model_adapters: Collection[str]) -> None:
    """Add a hook to a LoRA layer that raises InputError before each forward if an active adapter is not on the model.

    Args:
        model_adapters: the model's `peft_config`, which changes with its adapters. Not every adapter is on every layer.
    """
    if "known_adapters" not in vars(layer):
        layer.register_forward_pre_hook(require_active_adapters)
    layer.known_adapters = model_adapters


def require_active_adapters(layer: Any, inputs: Any = None) -> None:
    """Raise InputError if an active adapter of a LoRA layer is not on the model."""
    model_adapters = vars(layer).get("known_adapters")
    if model_adapters is not None and not (layer.merged or layer.disable_adapters):
        require_known_adapters(layer.active_adapters, model_adapters)


def require_known_adapters(names: Iterable[str], model_adapters: Collection[str]) -> None:
    """Raise InputError for a name that is not among the model's adapters. PEFT's layers would ignore its name, and
    compute the base instead."""
    for name in names:
        if name not in model_adapters:
            problem = f"the model has no adapter of this name, only {', '.join(sorted(model_adapters)) or 'its base'}"
            raise InputError("adapter", name, problem, "Name one of these, or attach it to the model first.")


def list_active_adapters(layer: Any) -> list[str] | None:
    """Return the names of a LoRA layer's active adapters, or None if the fast forward does not support one of them. It
    supports neither an adapter with more than LoRA's two matrices (a variant, a bias, dropout), nor one that is merged
    into the weight.

    Raises:
        InputError: see `require_known_adapters`.
    """
    if layer.merged:
        return None
    if layer.disable_adapters:
        return []
    require_active_adapters(layer)
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        dropout = layer.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training
        if drops or name in layer.lora_variant or layer.lora_B[name].bias is not None:
            return None
    return active
