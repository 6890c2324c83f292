"""Products whose rows come out the same beside any others.

A library chooses its order of addition by the shape of a product. So a row computed beside 31 others may differ in its
last bits from the same row alone: oneDNN in fp32 does so for a single row, in bf16 with AMX for other numbers of rows
too (at 576 → 49,152 features, 32 rows and 33), MKL for one to three rows. Which shapes agree is measured on the
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align.ops.linear import linear, pack_weight

TILE = 32
LEAST = 2
"""Rows of a product at most, and at least: beside 33 others rows may differ from those beside 31, and a single row
from any."""
LARGE = 1 << 22
"""Numbers in a weight from which on only `TRIED_ROWS` are tried."""
TRIED_ROWS = (2, 3, 5, 8, 12, 16, 17, 24, 31)


class Product(NamedTuple):
    """x Wᵀ + b, the weight laid out once.

    Attributes:
        free: any number of rows from `LEAST` to `TILE` may go through at once; otherwise exactly `TILE`.
    """

    weight: Tensor
    bias: Tensor | None
    free: bool

    def __call__(self, x_PI: Tensor) -> Tensor:
        """Multiply as many rows as `padded_rows` returns."""
        if len(x_PI) <= TILE:
            return linear(x_PI, self.weight, self.bias)
        return torch.cat([linear(part, self.weight, self.bias) for part in x_PI.split(TILE)])


def least_batch() -> int:
    """Return the least number of matrices of a batched product. With fewer of them than threads, MKL has several
    threads compute one, in another order of addition."""
    return max(2, torch.get_num_threads())


def at_least(x: Tensor, batch: int) -> Tensor:
    """Repeat the matrices of a batched product [B, …] until there are `batch` of them."""
    return x if len(x) >= batch else x.repeat(-(-batch // len(x)), 1, 1)


def padded_rows(rows: int, free: bool) -> int:
    """Return the number of rows of a step, given those of requests."""
    if not free:
        return -(-rows // TILE) * TILE
    return rows + 1 if rows % TILE == 1 else rows


def prepare_product(weight_OI: Tensor, bias_O: Tensor | None, agree: dict[tuple[int, int], bool]) -> Product:
    """Lay a weight out.

    Args:
        agree: the results of `rows_agree` by shape of the weight; it grows.
    """
    outputs, inputs = weight_OI.shape
    if (outputs, inputs) not in agree:
        agree[outputs, inputs] = rows_agree(inputs, outputs, weight_OI.dtype)
    return Product(pack_weight(weight_OI, TILE), bias_O, agree[outputs, inputs])


def rows_agree(inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Return whether rows are the same in products of `LEAST` to `TILE` rows, wherever they stand in them."""
    x, weight = cancelling_pairs(TILE, inputs, outputs, dtype)
    laid_out = pack_weight(weight, TILE)
    whole = linear(x, laid_out)
    tried = range(LEAST, TILE) if weight.numel() < LARGE else TRIED_ROWS
    anywhere = all(torch.equal(linear(x.roll(by, 0), laid_out), whole.roll(by, 0)) for by in (1, 5, TILE // 2))
    return anywhere and all(torch.equal(linear(x[:rows], laid_out), whole[:rows]) for rows in tried)


def blocks_agree(inputs: int, outputs: int, sizes: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether rows are the same in batched products of as few blocks as there may be and of more, of each of
    these sizes, wherever they stand in a block, with a weight for each block and with one for all."""
    most = least_batch() + 18
    rows, weight = cancelling_pairs(most * max(sizes), inputs, outputs, dtype)
    x = rows.view(most, max(sizes), inputs)
    weights = weight.T.repeat(most, 1, 1)
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


def cancelling_pairs(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x [rows, in] and W [out, in] whose products are sums of pairs that cancel, each pair's two far apart, of
    very different sizes. Only rounding is left: another order of addition shows in nearly every number, in bf16
    too, whose few bits would hide it in a sum of any size."""
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs, generator=draw)
    half = inputs // 2
    x, weight = (torch.randn(n, inputs, generator=draw).to(dtype) for n in (rows, outputs))
    first, second, unpaired = order.split([half, half, inputs % 2])
    x *= 2.0 ** torch.randint(-8, 9, (inputs,), generator=draw)
    x[:, second] = -x[:, first]
    weight[:, second] = weight[:, first]
    x[:, unpaired] = 0
    return x, weight
