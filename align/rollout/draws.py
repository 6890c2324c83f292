"""Drawing a token of a distribution by one uniform number."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def draw_tokens(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One index a row [B], each with its probability: the first whose cumulative sum exceeds a uniform number.

    One random number a row, where `torch.multinomial` takes one for each token of the vocabulary. The sums are taken in
    fp64, so that rounding favours no index: of blocks of 64 first, then within the block that was hit, for a cumulative
    sum over a whole vocabulary takes longer than all the rest.
    """
    blocks = pad_to(probabilities_BV, BLOCK).unflatten(1, (-1, BLOCK))
    ends = blocks.sum(-1, dtype=torch.double).cumsum(-1)
    target = uniform_B[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    # The block's own sum may round below the one that it was chosen by: what is left must lie within it.
    left = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(target)))
    index = block * BLOCK + torch.searchsorted(inside, left, right=True)
    return index.squeeze(-1).clamp_max(probabilities_BV.shape[1] - 1)  # of nan comes any place, also behind the last


def chance_of(drawn_B: Tensor, probabilities_BV: Tensor) -> Tensor:
    """The probability [B] that each token was drawn with."""
    return probabilities_BV.gather(1, drawn_B[:, None]).squeeze(1)


def pad_to(x_BV: Tensor, multiple: int) -> Tensor:
    """With zeros behind, up to a multiple."""
    return torch.nn.functional.pad(x_BV, (0, -x_BV.shape[1] % multiple))
