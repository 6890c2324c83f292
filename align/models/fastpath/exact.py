"""Products whose rows come out the same beside any others.

A library chooses its order of addition by the shape of a product. So a row computed beside 31 others may differ in its
last bits from the same row alone: oneDNN in fp32 does so for a single row, in bf16 with AMX for other numbers of rows
too (at 576 → 49,152 features, 32 rows and 33), MKL for one to three rows. Which shapes agree is asked of the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align.ops.linear import linear, packed

TILE, LEAST = 32, 2
"""Rows of a product at most, and at least: beside 33 others rows may differ from those beside 31, and a single row
from any."""
LARGE = 1 << 22
"""Numbers in a weight from which on not every number of rows is tried."""
SOME = (2, 3, 5, 8, 12, 16, 17, 24, 31)


class Product(NamedTuple):
    """x Wᵀ + b, the weight laid out once.

    Attributes:
        free: any number of rows from `LEAST` to `TILE` may go through at once; otherwise exactly `TILE`.
    """

    weight: Tensor
    bias: Tensor | None
    free: bool

    def __call__(self, x_PI: Tensor) -> Tensor:
        """As many rows as `padded_rows` says."""
        parts = (x_PI,) if len(x_PI) <= TILE else x_PI.split(TILE)
        made = [linear(part, self.weight, self.bias) for part in parts]
        return made[0] if len(made) == 1 else torch.cat(made)


def least_batch() -> int:
    """Matrices of a batched product, at least. With fewer of them than threads, MKL has several threads compute one, in
    another order of addition."""
    return max(2, torch.get_num_threads())


def at_least(x: Tensor, batch: int) -> Tensor:
    """Matrices of a batched product [B, …], repeated until there are so many."""
    return x if len(x) >= batch else x.repeat(-(-batch // len(x)), 1, 1)


def padded_rows(rows: int, free: bool) -> int:
    """How many rows a step has with so many of requests."""
    if not free:
        return -(-rows // TILE) * TILE
    return rows + 1 if rows % TILE == 1 else rows


def product(weight_OI: Tensor, bias_O: Tensor | None, known: dict[tuple[int, int], bool]) -> Product:
    """A weight, laid out.

    Args:
        known: what was found of weights of other layers, by their shape; it grows.
    """
    outputs, inputs = weight_OI.shape
    if (outputs, inputs) not in known:
        known[outputs, inputs] = rows_agree(inputs, outputs, weight_OI.dtype)
    return Product(packed(weight_OI, TILE), bias_O, known[outputs, inputs])


def rows_agree(inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether rows are the same in products of `LEAST` to `TILE` rows, wherever they stand in them."""
    x, weight = cancelling(TILE, inputs, outputs, dtype)
    laid_out = packed(weight, TILE)
    whole = linear(x, laid_out)
    tried = range(LEAST, TILE) if weight.numel() < LARGE else SOME
    anywhere = all(torch.equal(linear(x.roll(by, 0), laid_out), whole.roll(by, 0)) for by in (1, 5, TILE // 2))
    return anywhere and all(torch.equal(linear(x[:rows], laid_out), whole[:rows]) for rows in tried)


def blocks_agree(inputs: int, outputs: int, sizes: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether rows are the same in batched products of as few blocks as there may be and of more, of each of these
    sizes, wherever they stand in a block, with a weight for each block and with one for all."""
    most = least_batch() + 18
    rows, weight = cancelling(most * max(sizes), inputs, outputs, dtype)
    x, weights = rows.view(most, max(sizes), inputs), weight.T.repeat(most, 1, 1)
    whole = torch.bmm(x, weights)
    for by in range(1, max(sizes)):
        if not torch.equal(torch.bmm(x.roll(by, 1), weights), whole.roll(by, 1)):
            return False
    for size in sizes:
        for blocks in range(least_batch(), most + 1):
            part = x[:blocks, :size].contiguous()
            each, one = (torch.bmm(part, w) for w in (weights[:blocks], weights[:1].expand(blocks, -1, -1)))
            if not (torch.equal(each, whole[:blocks, :size]) and torch.equal(one, each)):
                return False
    return True


def cancelling(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, in] and W [out, in] whose products are sums of pairs that cancel, each pair's two far apart, of very
    different sizes. What is left is rounding alone: another order of addition shows in nearly every number, in bf16
    too, whose few bits would hide it in a sum of any size."""
    draw = torch.Generator().manual_seed(0)
    order, half = torch.randperm(inputs, generator=draw), inputs // 2
    x, weight = (torch.randn(n, inputs, generator=draw).to(dtype) for n in (rows, outputs))
    first, second, left = order[:half], order[half : 2 * half], order[2 * half :]
    x *= 2.0 ** torch.randint(-8, 9, (inputs,), generator=draw)
    x[:, second], weight[:, second] = -x[:, first], weight[:, first]
    x[:, left] = 0
    return x, weight
