"""Linear layers in fp32 on a CPU, by the library that is quick at them (`align.ops.linear`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align.models.fastpath.layers import Matrix, projected


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def forward(self: Any, x: Tensor) -> Tensor:
    """W x + b."""
    weight = self.weight
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
        return nn.Linear.forward(self, x)
    trained = weight if weight.requires_grad else None
    matrix = Matrix(weight.to, (self.out_features, self.in_features), self.bias, trained=trained)
    flat = projected(x.flatten(0, -2), (matrix,))[0]
    return flat.unflatten(0, x.shape[:-1])
