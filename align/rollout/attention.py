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
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "align_decode"


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `sdpa`, which it calls for anything but one query a row.

    Args:
        query: [B, heads, 1, D]; key, value: [B, groups, S, D].
        attention_mask: boolean, True where attention is allowed, or added to the scores; [B, 1, 1, S].
    """
    rows, heads, new, width = query.shape
    groups = key.shape[1]
    if new != 1 or options.get("position_bias") is not None or options.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scaling = options.get("scaling") or width**-0.5
    scores = torch.bmm(query.reshape(rows * groups, heads // groups, width), key.flatten(0, 1).transpose(1, 2))
    scores = scores.view(rows, groups, heads // groups, -1).float() * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores += attention_mask
    weights = scores.softmax(-1).to(value.dtype).flatten(0, 1)
    return torch.bmm(weights, value.flatten(0, 1)).view(rows, 1, heads, width), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def for_decoding(model: Any) -> Iterator[None]:
    """Use it within this block where the model uses `sdpa` on a CPU."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    apt = before == "sdpa" and next(model.parameters()).device.type == "cpu"
    if apt:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        if apt:
            config._attn_implementation = before
