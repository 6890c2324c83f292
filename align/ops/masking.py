"""Statistics over the real tokens of a ragged batch. In every mask True means: this entry counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Σ x over the mask, a scalar. Entries outside may hold anything, NaN included."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the mask, a scalar.

    Raises:
        ValueError: the mask is empty; a mean over nothing hides a mistake.
    """
    count = mask.sum()
    if count == 0:
        raise ValueError("a masked mean over nothing")
    return masked_sum(x, mask) / count


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance of x over the mask (population, divided by n), a scalar."""
    mean = masked_mean(x, mask)
    return masked_mean((x - mean).square(), mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """x scaled to unit variance over the mask, and to mean 0 unless `shift_mean` is False; 0 outside the mask.

    Rewards are whitened with `shift_mean=False`: moving their mean would change what is optimised, for longer
    responses collect more of it.
    """
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, torch.zeros_like(white))
