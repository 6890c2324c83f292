"""Random numbers as a function of a key and a counter: no state, and none of them needs those before it."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random words of each counter under each key (Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3", 2011, section 3.3).

    Args:
        counter, key: words of 32 bits as int64, of shapes that broadcast.

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
    key = (seeds_B[:, None] & WORD, seeds_B[:, None] >> 32 & WORD)
    position = torch.arange(columns, device=seeds_B.device)
    zero = torch.zeros_like(position)
    high, low, *_ = philox((position, zero, zero, zero), key)
    return ((high >> 6 << 27) + (low >> 5)).double() / 2**53
