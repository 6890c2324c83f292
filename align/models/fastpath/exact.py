"""Matrix products in which the bits of a row's result do not depend on the other rows.

A library chooses its order of addition by the shape of a product, so that a row computed beside 31 others may differ in
its last bits from the same row alone: with oneDNN in fp32 for a single row, in bf16 with AMX for other numbers of rows
too (at 576 → 49,152 features, 32 rows and 33), with MKL for one to three rows. Which shapes agree is measured on the
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
"""Maximum (`TILE`) and minimum (`LEAST`) rows of a product. Rows beside 33 others may differ from those beside 31, and
a single row from all of them."""
LARGE = 1 << 22
"""Number of elements of a weight from which on only `TRIED_ROWS` are tried."""
TRIED_ROWS = (2, 3, 5, 8, 12, 16, 17, 24, 31)


class Product(NamedTuple):
    """The product x Wᵀ + b, with a weight in the layout of the matrix library.

    Attributes:
        takes_any_rows: whether it takes any number of rows from `LEAST` to `TILE` at once; otherwise exactly `TILE`.
    """

    weight: Tensor
    bias: Tensor | None
    takes_any_rows: bool

    def __call__(self, x_PI: Tensor) -> Tensor:
        """Multiply the rows of x by the weight in tiles. Their number must be one that `count_padded_rows` returns."""
        if len(x_PI) <= TILE:
            return linear(x_PI, self.weight, self.bias)
        return torch.cat([linear(part, self.weight, self.bias) for part in x_PI.split(TILE)])


def compute_min_batch() -> int:
    """Return the minimum number of matrices in a batched product for which a row's bits are independent of the others.
    With fewer matrices than threads, MKL splits one over several threads, in another order of addition."""
    return max(2, torch.get_num_threads())


def repeat_to_batch(x: Tensor, batch: int) -> Tensor:
    """Repeat the matrices of a batched product [B, …] until there are at least `batch` of them."""
    return x if len(x) >= batch else x.repeat(-(-batch // len(x)), 1, 1)


def count_padded_rows(rows: int, takes_any_rows: bool) -> int:
    """Return the number of rows to which a step must be padded, so that the bits of a row do not depend on the
    others."""
    if not takes_any_rows:
        return -(-rows // TILE) * TILE
    return rows + 1 if rows % TILE == 1 else rows


def pack_product(weight_OI: Tensor, bias_O: Tensor | None, agreement_by_shape: dict[tuple[int, int], bool]) -> Product:
    """Convert a weight to the layout of the matrix library, and measure once per shape whether its rows are
    independent.

    Args:
        agreement_by_shape: shape of a weight → result of `are_rows_independent`; it is extended.
    """
    outputs, inputs = weight_OI.shape
    if (outputs, inputs) not in agreement_by_shape:
        agreement_by_shape[outputs, inputs] = are_rows_independent(inputs, outputs, weight_OI.dtype)
    return Product(pack_weight(weight_OI, TILE), bias_O, agreement_by_shape[outputs, inputs])


def are_rows_independent(inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Return whether a row's result has the same bits in products of `LEAST` to `TILE` rows, at any position."""
    x, weight = draw_cancelling_pairs(TILE, inputs, outputs, dtype)
    packed_weight = pack_weight(weight, TILE)
    expected = linear(x, packed_weight)
    tried = range(LEAST, TILE) if weight.numel() < LARGE else TRIED_ROWS
    anywhere = all(torch.equal(linear(x.roll(by, 0), packed_weight), expected.roll(by, 0)) for by in (1, 5, TILE // 2))
    return anywhere and all(torch.equal(linear(x[:rows], packed_weight), expected[:rows]) for rows in tried)


def are_blocks_independent(inputs: int, outputs: int, sizes: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether a row's result has the same bits in batched products of any tested number and size of blocks. It
    must also be the same at any position in a block, and with a weight for each block or one for all."""
    most = compute_min_batch() + 18
    rows, weight = draw_cancelling_pairs(most * max(sizes), inputs, outputs, dtype)
    x = rows.view(most, max(sizes), inputs)
    weights = weight.T.repeat(most, 1, 1)
    expected = torch.bmm(x, weights)
    for by in range(1, max(sizes)):
        if not torch.equal(torch.bmm(x.roll(by, 1), weights), expected.roll(by, 1)):
            return False
    for size in sizes:
        for blocks in range(compute_min_batch(), most + 1):
            part = x[:blocks, :size].contiguous()
            own_weights = torch.bmm(part, weights[:blocks])
            shared_weight = torch.bmm(part, weights[:1].expand(blocks, -1, -1))
            if not torch.equal(own_weights, expected[:blocks, :size]) or not torch.equal(shared_weight, own_weights):
                return False
    return True


def draw_cancelling_pairs(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random x [rows, in] and W [out, in] whose products are 0 except for rounding errors, which reveal the
    order of addition. Each product is a sum of cancelling pairs of very different magnitudes, whose two terms are far
    apart. Another order of addition changes nearly every number, even in bf16, whose few bits would hide it in larger
    sums."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs, generator=generator)
    half = inputs // 2
    x, weight = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (rows, outputs))
    first, second, unpaired = order.split([half, half, inputs % 2])
    x *= 2.0 ** torch.randint(-8, 9, (inputs,), generator=generator)
    x[:, second] = -x[:, first]
    weight[:, second] = weight[:, first]
    x[:, unpaired] = 0
    return x, weight
