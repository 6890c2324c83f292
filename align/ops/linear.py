"""x Wᵀ by whichever library is quick at it.

torch sends fp32 products on a CPU to MKL. On AMD's processors that reaches less than half of what oneDNN does, which
the same build of torch carries: 212 GFLOP/s beside 470, two threads of an EPYC with AVX-512 (docs/decisions.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, without a gradient: [N, O]. Either matrix may be a transposed view, and the weight a `packed` one."""
    if weight_OI.is_mkldnn or (ONEDNN and x_NI.dtype == torch.float32 and x_NI.device.type == "cpu"):
        return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return torch.nn.functional.linear(x_NI, weight_OI, bias_O)


def bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this processor."""
    return ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(weight_OI: Tensor, rows: int) -> Tensor:
    """A copy of a weight, laid out for products with about so many rows: for a few rows the product spends much of its
    time on laying the weight out anew. The weight itself where oneDNN is missing, or has no products in its dtype: bf16
    needs a processor that can do it."""
    dtypes = (torch.float32, torch.bfloat16) if bf16() else (torch.float32,)
    if not ONEDNN or weight_OI.device.type != "cpu" or weight_OI.dtype not in dtypes:
        return weight_OI
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
