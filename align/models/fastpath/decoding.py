"""One new token a row through a Llama-like decoder that has read the rest: many small passes over weights that stay as
they are."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from align.models.fastpath.cache import ReservedCache
from align.models.fastpath.layers import Matrix, stacked, turn
from align.models.fastpath.weights import Decoder
from align.ops.linear import linear, packed

COPY = 1 << 30
"""Bytes that a copy of the weights may take."""


class StackedMatrices(NamedTuple):
    """Matrices that read the same input, as one.

    Attributes:
        weight: of all, one below the other, laid out for oneDNN; None where a copy would be too large.
        bias: likewise.
        a: the A of all, one below the other [Σ r, in]; None where nothing is added.
        b: s · Bᵀ of each, fp32, on the diagonal of [Σ r, Σ out].
    """

    matrices: tuple[Matrix, ...]
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @classmethod
    def of(cls, matrices: tuple[Matrix, ...], dtype: torch.dtype, rows: int, copied: bool) -> StackedMatrices:
        weight = packed(torch.cat([m.weight(dtype) for m in matrices]), rows) if copied else None
        sizes = [m.shape[0] for m in matrices]
        bias = None
        if any(m.bias is not None for m in matrices):
            zeros = (torch.zeros(size, dtype=dtype) for size in sizes)
            bias = torch.cat([zero if m.bias is None else m.bias for m, zero in zip(matrices, zeros, strict=True)])
        lows = [m.low for m in matrices if m.low]
        if not lows:
            return cls(matrices, weight, bias, None, None)
        diagonal = [
            (m.low.b * m.low.scaling).t().float() if m.low else torch.zeros(0, size)
            for m, size in zip(matrices, sizes, strict=True)
        ]
        return cls(matrices, weight, bias, stacked(lows, dtype), torch.block_diag(*diagonal))

    def __call__(self, x_BI: Tensor) -> Tensor:
        """The outputs of all, side by side [B, Σ out]."""
        if self.weight is not None:
            out = linear(x_BI, self.weight, self.bias)
        else:
            out = torch.cat([linear(x_BI, m.weight(x_BI.dtype), m.bias) for m in self.matrices], 1)
        return out if self.a is None or self.b is None else out.add_(linear(x_BI, self.a).float() @ self.b)


class Step(NamedTuple):
    """One layer, ready for many tokens."""

    norm: Tensor
    qkv: StackedMatrices
    qk_norms: tuple[Tensor, Tensor] | None
    o: StackedMatrices
    mlp_norm: Tensor
    gate_up: StackedMatrices
    down: StackedMatrices


class Steady(NamedTuple):
    """A decoder that does not change while a cache is in use."""

    steps: list[Step]
    norm: Tensor
    eps: float
    head: int
    scale: float

    def normed(self, x: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x, weight_D.shape, weight_D, self.eps)


def steady(decoder: Decoder, dtype: torch.dtype, rows: int) -> Steady:
    """A decoder for many tokens of so many rows: weights copied side by side, unpacked where they are quantised, and
    adapters stacked, scaled, and in the dtype of the activations."""
    matrices = [m for x in decoder.layers for m in (*x.qkv, *x.o, *x.gate_up, *x.down)]
    copied = sum(m.shape[0] * m.shape[1] for m in matrices) * dtype.itemsize <= COPY
    group = partial(StackedMatrices.of, dtype=dtype, rows=rows, copied=copied)
    steps = [
        Step(x.norm, group(x.qkv), x.qk_norms, group(x.o), x.mlp_norm, group(x.gate_up), group(x.down))
        for x in decoder.layers
    ]
    return Steady(steps, decoder.norm, decoder.eps, decoder.head, decoder.scale)


def one_token(
    self: Any, steady: Steady, ids_B1: Tensor, mask_BS: Tensor, positions_B1: Tensor, cache: ReservedCache
) -> Tensor:
    """Hidden states [B, 1, D] of one new token a row, which joins the cache and reads what is in it."""
    x_BD = self.embed_tokens(ids_B1[:, 0])
    cos_BD, sin_BD = (t[0] for t in self.rotary_emb(x_BD, position_ids=positions_B1.T))
    groups = cache.groups
    barred = torch.zeros(mask_BS.shape).masked_fill_(~mask_BS, float("-inf")).repeat_interleave(groups, 0)[:, None]
    for number, step in enumerate(steady.steps):
        heads = step.qkv(steady.normed(x_BD, step.norm)).unflatten(1, (-1, steady.head))
        qk, v = heads[:, :-groups], heads[:, -groups:]
        if step.qk_norms is not None:
            normed = zip((qk[:, :-groups], qk[:, -groups:]), step.qk_norms, strict=True)
            qk = torch.cat([steady.normed(t, weight) for t, weight in normed], 1)
        qk = turn(qk, cos_BD, sin_BD, 1.0)
        keys, values = (t.flatten(0, 1) for t in cache.update(qk[:, -groups:, None], v[:, :, None], number))
        asked = qk[:, :-groups].float().reshape(len(keys), -1, steady.head)
        scores = torch.baddbmm(barred, asked, keys.transpose(1, 2), alpha=steady.scale)
        seen = torch.bmm(scores.softmax(-1).to(values.dtype), values)
        x_BD = step.o(seen.view(len(x_BD), -1)).add_(x_BD)
        gate, up = step.gate_up(steady.normed(x_BD, step.mlp_norm)).chunk(2, 1)
        x_BD = step.down(silu(gate).mul_(up)).add_(x_BD)
    return steady.normed(x_BD, steady.norm)[:, None]
