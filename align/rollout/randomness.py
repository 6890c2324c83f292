"""Randomness as a function of the place where it is drawn, and the draw of a token by one uniform number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def place_seed(*where: Any) -> int:
    """63 bits that belong to one place, such as `(seed, "rollout", update, row)`."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:8], "big") >> 1


def generator_for(device: torch.device, seed: int, *where: str | int) -> torch.Generator:
    """A generator for one place in a run, such as `(seed, "minibatches", update)`."""
    return torch.Generator(device).manual_seed(place_seed(seed, *where))


def row_seeds(rows: Iterable[Any], seed: int, *where: str | int) -> list[int]:
    """A seed for each row that is sampled at one place in a run. What a row draws depends on its own seed, and so on no
    other row: not on how many are sampled, in which order, or in which process.

    Args:
        rows: what tells the rows of that place apart, such as their numbers.
    """
    return [place_seed(seed, *where, row) for row in rows]


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
