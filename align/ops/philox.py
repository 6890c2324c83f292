"""Random numbers as a function of a key and a counter, and the draw of a token by one of them.

There is no state, and no number needs those before it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Philox4x32-10: four random words of each counter under each key (Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3", 2011, section 3.3).

    Args:
        counter, key: words of 32 bits as int64, of shapes that broadcast; all tensors, or all arrays of NumPy's.

    Returns:
        four words of 32 bits, as int64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A product of two words has 64 bits and wraps into the sign: its bits are right, and the masks see bits alone.
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def uniforms(seeds_B: Tensor, columns: int) -> Tensor:
    """Numbers in [0, 1) of 53 bits [B, columns], fp64: number t of a row is a function of (its seed, t) alone.

    Args:
        seeds_B: int64, all 64 bits of which count.
    """
    position = torch.arange(columns, device=seeds_B.device)
    return numbers(seeds_B[:, None], position, torch.zeros_like(position)).double() / 2**53


def uniforms_of(seed: int, columns: int) -> list[float]:
    """One row of `uniforms`, by NumPy: a hundred operations on a few numbers take torch five times as long.

    Args:
        seed: int64.
    """
    position = np.arange(columns)
    return (numbers(np.array([seed]), position, np.zeros_like(position)) / 2**53).tolist()


def numbers(seeds: Any, position: Any, zero: Any) -> Any:
    """Whole numbers of 53 bits."""
    high, low, *_ = philox((position, zero, zero, zero), (seeds & WORD, seeds >> 32 & WORD))
    return (high >> 6 << 27) + (low >> 5)


BLOCK = 64


def draw_tokens(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One index a row [B], each with its probability: the first whose cumulative sum exceeds a uniform number.

    One random number a row, where `torch.multinomial` takes one for each token of the vocabulary. The sums are taken in
    fp64, so that rounding favours no index: of blocks of 64 first, then within the block that was hit, for a cumulative
    sum over a whole vocabulary takes longer than all the rest.
    """
    missing = -probabilities_BV.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(probabilities_BV, (0, missing)).unflatten(1, (-1, BLOCK))
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
