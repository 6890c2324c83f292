"""A rollout a few rows at a time, rows of like length together, so that little padding is computed. Each rank computes
its share of these chunks, and all have the whole in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from align import ranks
from align.core.types import Rollout


def by_length(rollout: Rollout, size: int) -> Iterator[Tensor]:
    """Row indices in chunks of at most `size`, rows of like length together."""
    order = torch.argsort(rollout.mask_BS.sum(-1), stable=True)
    yield from order.split(size)


def in_chunks(function: Callable[[Rollout], Tensor], rollout: Rollout, size: int) -> Tensor:
    """`function` over a rollout, `size` rows at a time, in the rows' own order.

    Args:
        function: rollout → one number a row [B], or one a response token [B, T], for the rows it is given.
    """
    return several_in_chunks(lambda part: (function(part),), rollout, size)[0]


def several_in_chunks(
    function: Callable[[Rollout], tuple[Tensor, ...]], rollout: Rollout, size: int
) -> tuple[Tensor, ...]:
    """The same for a function that gives several such tensors."""
    width = rollout.response_mask_BT.shape[1]
    indices = list(by_length(rollout, size))
    mine = [function(rollout.rows(index)) for index in ranks.dealt(indices)]
    parts = zip(*(mine if ranks.alone() else shared(mine, len(indices), rollout.tokens_BS.device)), strict=True)
    order = torch.argsort(torch.cat(indices))
    return tuple(torch.cat([padded_to(x, width) for x in xs])[order] for xs in parts)


def shared(mine: list[tuple[Tensor, ...]], count: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """What all ranks found for `count` chunks, in their order; `mine` is this rank's share."""
    found = ranks.gathered([tuple(x.detach().cpu().clone() for x in xs) for xs in mine], count)
    return [tuple(x.to(device) for x in xs) for xs in found]


def padded_to(x: Tensor, width: int) -> Tensor:
    """[B, T] padded with 0 to `width` columns; a [B] as it is."""
    return pad(x, (0, width - x.shape[1])) if x.dim() == 2 else x
