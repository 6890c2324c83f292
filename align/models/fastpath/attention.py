"""Causal attention over rows of different length, with a backward pass that is written out.

    softmax(s · Q_h K_gᵀ, each token to itself and those before it) V_g

(Vaswani et al., 2017; a key for several queries, Ainslie et al., GQA, 2023.) torch's fused kernel for CPUs is made for
long rows: at 16 rows of 68 tokens in bf16, forward and backward take it 11 ms a layer and these plain products 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
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
