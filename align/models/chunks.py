"""Compute over a rollout in chunks of rows of similar length, which have little padding.

Each rank computes its share of the chunks, and all ranks get the whole result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from align import ranks
from align.core.types import Rollout


def split_by_length(rollout: Rollout, size: int) -> Iterator[Tensor]:
    """Yield row indices in chunks of at most `size`, rows of similar length together."""
    order = torch.argsort(rollout.mask_BS.sum(-1), stable=True)
    yield from order.split(size)


def compute_in_chunks(function: Callable[[Rollout], Tensor], rollout: Rollout, size: int) -> Tensor:
    """Return `function` of a rollout, computed `size` rows at a time, in the rows' own order.

    Args:
        function: rollout → one number a row [B], or one a response token [B, T].
    """
    return compute_several_in_chunks(lambda part: (function(part),), rollout, size)[0]


def compute_several_in_chunks(
    function: Callable[[Rollout], tuple[Tensor, ...]], rollout: Rollout, size: int
) -> tuple[Tensor, ...]:
    """Do the same for a function that returns several such tensors."""
    width = rollout.response_mask_BT.shape[1]
    indices = list(split_by_length(rollout, size))
    chunks = [function(rollout.rows(index)) for index in ranks.own_share(indices)]
    if not ranks.is_alone():
        device = rollout.tokens_BS.device
        gathered = ranks.gather_shares(
            [tuple(x.detach().cpu().clone() for x in chunk) for chunk in chunks], len(indices)
        )
        chunks = [tuple(x.to(device) for x in chunk) for chunk in gathered]
    order = torch.argsort(torch.cat(indices))
    return tuple(torch.cat([pad_to(x, width) for x in parts])[order] for parts in zip(*chunks, strict=True))


def pad_to(x: Tensor, width: int) -> Tensor:
    """Return [B, T] padded with 0 to `width` columns; a [B] as it is."""
    return pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x
