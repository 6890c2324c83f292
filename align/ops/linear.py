"""Matrix products x Wᵀ on a CPU by the faster of two libraries, oneDNN or MKL.

torch computes fp32 products on a CPU with MKL. On AMD's processors that is less than half as fast as oneDNN, which the
same build of torch contains: 212 GFLOP/s against 470 with two threads of an EPYC with AVX-512 (docs/decisions.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, [N, O], without a gradient, by oneDNN for fp32 on a CPU. Either matrix may be a transposed view,
    and the weight may come from `pack_weight`."""
    if weight_OI.is_mkldnn or (ONEDNN and x_NI.dtype == torch.float32 and x_NI.device.type == "cpu"):
        return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return torch.nn.functional.linear(x_NI, weight_OI, bias_O)


def has_bf16_products() -> bool:
    """Return whether oneDNN is available and multiplies bf16 matrices on this processor."""
    return ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weight(weight_OI: Tensor, row_count: int) -> Tensor:
    """Return a copy of a weight matrix in oneDNN's layout, for products with about `row_count` rows.

    A product with few rows otherwise spends much of its time on converting the layout. Returns the weight itself if
    oneDNN is missing or cannot multiply its dtype on this processor.
    """
    dtypes = (torch.float32, torch.bfloat16) if has_bf16_products() else (torch.float32,)
    if not ONEDNN or weight_OI.device.type != "cpu" or weight_OI.dtype not in dtypes:
        return weight_OI
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, row_count)
