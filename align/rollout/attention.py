"""Attention of one new token to a cache, on a CPU.

torch's fused kernel is made for long queries: one token of 16 rows against 68 keys takes it 0.5 ms, and as two small
batched products 0.13. Grouped keys and values are read where they lie, not repeated for each query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MORE = ("dropout", "softcap", "s_aux", "position_bias")
"""What some architectures ask for besides; the fused kernel's wrapper knows what to do about it."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `sdpa`, which it calls for anything but one query a row on a CPU.

    Args:
        query: [B, heads, 1, D]; key, value: [B, groups, S, D].
        attention_mask: boolean, True where attention is allowed, or added to the scores; [B, 1, 1, S].
    """
    rows, heads, new, width = query.shape
    groups = key.shape[1]
    if new != 1 or query.device.type != "cpu" or any(options.get(name) for name in MORE):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling") or width**-0.5
    # The products in fp32, as the fused kernel takes them.
    asked = (query.float() * scaling).reshape(rows * groups, heads // groups, width)
    scores = torch.bmm(asked, key.float().flatten(0, 1).transpose(1, 2)).view(rows, groups, heads // groups, -1)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores += attention_mask
    weights = scores.softmax(-1).flatten(0, 1)
    seen = torch.bmm(weights, value.float().flatten(0, 1)).to(query.dtype)
    return seen.view(rows, 1, heads, value.shape[-1]), None


@contextmanager
def for_decoding() -> Iterator[None]:
    """Within this block it stands in for `sdpa`, under that name: some architectures look at the name of their
    attention to choose their masks."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
