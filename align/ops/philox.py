"""Random numbers as a function of a key and a counter: no state, and none of them needs those before it."""

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
