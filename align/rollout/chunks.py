"""A rollout a few rows at a time, rows of like length together, so that little padding is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from align.types import Rollout


def by_length(rollout: Rollout, size: int) -> Iterator[Tensor]:
    """Row indices in chunks of at most `size`, rows of like length together."""
    order = torch.argsort(rollout.mask_BS.sum(-1), stable=True)
    yield from order.split(size)


def in_chunks(function: Callable[[Rollout], Tensor], rollout: Rollout, size: int) -> Tensor:
    """`function` over a rollout, `size` rows at a time, in the rows' own order.

    Args:
        function: rollout → one number a row [B], or one a response token [B, T], for the rows it is given.
    """
    width = rollout.response_mask_BT.shape[1]
    indices, parts = [], []
    for index in by_length(rollout, size):
        part = function(rollout.rows(index))
        parts.append(pad(part, (0, width - part.shape[1])) if part.dim() == 2 else part)
        indices.append(index)
    return torch.cat(parts)[torch.argsort(torch.cat(indices))]
