"""Statistics over the real tokens of a padded batch. Masks are True on entries that count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of x where the mask is True, a scalar. Entries outside it are ignored, NaN included."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x where the mask is True, a scalar.

    Raises:
        ValueError: the mask is empty.
    """
    count = mask.sum()
    if count == 0:
        raise ValueError("a masked mean over nothing")
    return masked_sum(x, mask) / count


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Return x scaled to variance 1 over the mask (divided by n), and to mean 0 if `shift_mean`; 0 outside the mask.

    Rewards are whitened with `shift_mean=False`: shifting their mean would change the objective, because longer
    responses have more tokens that are shifted.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_mean((x - mean).square(), mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
