"""Causal attention over rows of different length, with a backward pass that is written out.

    softmax(s · Q_h K_gᵀ, each token to itself and those before it) V_g

(Vaswani et al., 2017; a key for several queries, Ainslie et al., GQA, 2023.) torch's fused kernel for CPUs is made for
long rows: at 16 rows of 68 tokens in bf16, forward and backward take it 11 ms a layer and these plain products 2. For
long rows, whose weights would take too much memory, `causal_attention_by_row` calls that kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from align.models.fastpath.packed import PackedIndex


def causal_attention(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, places: PackedIndex, scale: float) -> Tensor:
    """What every token reads of itself and those before it in its row: [N, H, D].

    Args:
        q_NHD: queries; k_NGD, v_NGD: keys and values, each group of which serves H / G heads.
        scale: multiplies the products, usually D^−½.
    """
    return Causal.apply(q_NHD, k_NGD, v_NGD, places, scale)  # pyright: ignore[reportReturnType]


class Causal(torch.autograd.Function):
    """`causal_attention` as autograd takes it. Weights are made in fp32 and kept in the dtype of the values, in which
    they are multiplied with them, as the fused kernel does."""

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, places: PackedIndex, scale: float) -> Tensor:
        groups, columns = k_NGD.shape[1], places.longest
        q, k, v = (places.grouped(x, groups) for x in (q_NHD, k_NGD, v_NGD))
        wide = torch.promote_types(q.dtype, torch.float32)
        future = q.new_full((columns, columns), float("-inf"), dtype=wide).triu_(1).repeat(q.shape[1] // columns, 1)
        scores = torch.baddbmm(future, q.to(wide), k.to(wide).transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1).to(v.dtype)
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, weights)
        ctx.places, ctx.scale = places, scale
        return places.flat(torch.bmm(weights, v), q_NHD.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, weights = ctx.saved_tensors
        places, groups, heads = ctx.places, k_NGD.shape[1], q_NHD.shape[1]
        q, k, v = (places.grouped(x, groups) for x in (q_NHD, k_NGD, v_NGD))
        given = places.grouped_once(grads[0], groups)  # of a token in several rows, one row's output was taken
        on_v = torch.bmm(weights.transpose(1, 2), given)
        on_weights = torch.bmm(given, v.transpose(1, 2))
        on_scores = torch.ops.aten._softmax_backward_data(on_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        on_q, on_k = torch.bmm(on_scores, k), torch.bmm(on_scores.transpose(1, 2), q)
        return places.flat(on_q, heads), *(places.flat_summed(x, groups) for x in (on_k, on_v)), None, None


def causal_attention_by_row(q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, places: PackedIndex, scale: float) -> Tensor:
    """Compute `causal_attention` one row at a time, by torch's fused kernel, which keeps no weights.

    Memory grows with the length of a row in place of its square, and no padding is computed.
    """
    return CausalByRow.apply(q_NHD, k_NGD, v_NGD, places, scale)  # pyright: ignore[reportReturnType]


class CausalByRow(torch.autograd.Function):
    """The autograd function of `causal_attention_by_row`."""

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, places: PackedIndex, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        rows = [kernel(*row, 0.0, True, scale=scale) for row in split_rows(q_NHD, k_NGD, v_NGD, places)]
        seen_NHD = places.reduce(torch.cat([seen[0].transpose(0, 1) for seen, _ in rows]))
        # What was read is kept by the projection behind it too: expanded again, it takes no memory of its own.
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, seen_NHD, *(normaliser for _, normaliser in rows))
        ctx.places = places
        ctx.scale = scale
        return seen_NHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, seen_NHD, *normalisers = ctx.saved_tensors
        places = ctx.places
        groups = k_NGD.shape[1]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        lengths = [length for length in places.lengths() if length]
        seen_rows, grad_rows = (
            [row.transpose(0, 1)[None] for row in x_AHD.split(lengths)]
            for x_AHD in (places.expand(seen_NHD), places.expand_once(grads[0]))
        )
        row_grads = [
            kernel(grad, *row, seen, normaliser, 0.0, True, scale=ctx.scale)
            for row, seen, grad, normaliser in zip(
                split_rows(q_NHD, k_NGD, v_NGD, places), seen_rows, grad_rows, normalisers, strict=True
            )
        ]
        on_q, on_k, on_v = (
            torch.cat([grad[0].transpose(0, 1) for grad in row]) for row in zip(*row_grads, strict=True)
        )
        on_k, on_v = (on_x.unflatten(1, (groups, -1)).sum(2) for on_x in (on_k, on_v))
        return places.reduce(on_q), places.reduce_by_sum(on_k), places.reduce_by_sum(on_v), None, None


def split_rows(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, places: PackedIndex
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield queries, keys and values of each row that has a token, [1, H, S, D] each, a key for every query."""
    lengths = [length for length in places.lengths() if length]
    each = q_NHD.shape[1] // k_NGD.shape[1]
    # The kernel reads a last dimension with a stride of 1, and does not check it.
    q_rows, k_rows, v_rows = (places.expand(x).contiguous().split(lengths) for x in (q_NHD, k_NGD, v_NGD))
    for q, k, v in zip(q_rows, k_rows, v_rows, strict=True):
        k, v = (x.repeat_interleave(each, 1) for x in (k, v))
        yield q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
