"""Counter-based random numbers (Philox), and the sampling of tokens with them.

Each number is a function of a key and a counter alone, without any state.
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
    """Return four random 32-bit words for each counter and key, by the generator Philox4x32-10. Source: Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011, section 3.3.

    Args:
        counter, key: words of 32 bits as int64, of shapes that broadcast; all tensors, or all NumPy arrays.

    Returns:
        four words of 32 bits, as int64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # A product of two words has 64 bits and may overflow into the sign. Its bits are right, and only they are used.
        p0 = MULTIPLIERS[0] * c0
        p1 = MULTIPLIERS[1] * c2
        c0 = (p1 >> 32 & WORD) ^ c1 ^ k0
        c1 = p1 & WORD
        c2 = (p0 >> 32 & WORD) ^ c3 ^ k1
        c3 = p0 & WORD
        k0 = (k0 + INCREMENTS[0]) & WORD
        k1 = (k1 + INCREMENTS[1]) & WORD
    return c0, c1, c2, c3


def draw_uniforms(seeds_B: Tensor, columns: int) -> Tensor:
    """Return random numbers in [0, 1) with 53 bits, fp64 [B, columns]. Number t of a row is a function of (its seed, t)
    alone.

    Args:
        seeds_B: int64. All 64 bits are used.
    """
    position = torch.arange(columns, device=seeds_B.device)
    return draw_integers(seeds_B[:, None], position, torch.zeros_like(position)).double() / 2**53


def draw_uniform_row(seed: int, columns: int) -> list[float]:
    """Return one row of `draw_uniforms` as a list, by NumPy: for a few numbers torch takes five times as long.

    Args:
        seed: int64.
    """
    position = np.arange(columns)
    return (draw_integers(np.array([seed]), position, np.zeros_like(position)) / 2**53).tolist()


def draw_integers(seeds: Any, position: Any, zero: Any) -> Any:
    """Return a random integer of 53 bits for each pair of seed and position, which broadcast. All arguments are int64
    tensors or NumPy arrays."""
    high, low, *_ = philox((position, zero, zero, zero), (seeds & WORD, seeds >> 32 & WORD))
    return (high >> 6 << 27) + (low >> 5)


BLOCK = 64


def draw_tokens(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Sample one token id for each row [B]: the first whose cumulative probability exceeds a uniform number.

    It takes one random number for each row, where `torch.multinomial` takes one for each token of the vocabulary. Sums
    are in fp64, so that rounding favours no id. They are computed over blocks of 64 first, then within the block that
    was hit, because a cumulative sum over a whole vocabulary is slow.

    Args:
        probabilities_BV: need not sum to exactly 1.
        uniform_B: in [0, 1).
    """
    missing = -probabilities_BV.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(probabilities_BV, (0, missing)).unflatten(1, (-1, BLOCK))
    ends = blocks.sum(-1, dtype=torch.double).cumsum(-1)
    target = uniform_B[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    # The cumulative sum inside the block may round below the block's sum above: the remainder must lie within it.
    remainder = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(target)))
    index = block * BLOCK + torch.searchsorted(inside, remainder, right=True)
    return index.squeeze(-1).clamp_max(probabilities_BV.shape[1] - 1)  # nan may give any index, also one too many


def gather_probabilities(drawn_B: Tensor, probabilities_BV: Tensor) -> Tensor:
    """Return the probability of each row's sampled token, shape [B]."""
    return probabilities_BV.gather(1, drawn_B[:, None]).squeeze(1)
