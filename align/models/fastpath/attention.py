"""Causal attention over rows of different length, with a backward pass that is written out.

    softmax(s · Q_h K_gᵀ, each token to itself and those before it) V_g

(Vaswani et al., 2017; a key for several queries, Ainslie et al., GQA, 2023.) torch's fused kernel for CPUs is made for
long rows: at 16 rows of 68 tokens in bf16, forward and backward take it 11 ms a layer and these plain products 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class PackedIndex(NamedTuple):
    """Where the N real tokens of a ragged batch stand: in the rectangle [B, W] that they came in, where padding may be
    anywhere, and in the rectangle [B, S] of the same rows pushed to the left, S being the longest.

    Attributes:
        mask_BW: True on real tokens.
        longest: S.
        given_N, pushed_N: row · W + column and row · S + column of each token; None where no row has any padding.
    """

    mask_BW: Tensor
    longest: int
    given_N: Tensor | None
    pushed_N: Tensor | None

    @classmethod
    def of(cls, mask_BW: Tensor) -> PackedIndex:
        if bool(mask_BW.all()):
            return cls(mask_BW, mask_BW.shape[1], None, None)
        longest = int(mask_BW.sum(-1).max())
        given_N = mask_BW.flatten().nonzero().squeeze(-1)
        column_N = (mask_BW.long().cumsum(-1) - 1)[mask_BW]
        return cls(mask_BW, longest, given_N, given_N // mask_BW.shape[1] * longest + column_N)

    def real(self, x_BW: Tensor) -> Tensor:
        """What stands at the real tokens [N]."""
        return x_BW.reshape(-1) if self.given_N is None else x_BW.reshape(-1)[self.given_N]

    def rectangle(self, x_ND: Tensor) -> Tensor:
        """N tokens where they came from [B, W, …], 0 on padding."""
        shape = (*self.mask_BW.shape, *x_ND.shape[1:])
        if self.given_N is None:
            return x_ND.view(shape)
        return x_ND.new_zeros(self.mask_BW.numel(), *x_ND.shape[1:]).index_copy(0, self.given_N, x_ND).view(shape)

    def grouped(self, x_NHD: Tensor, groups: int) -> Tensor:
        """[N, H, D] as [B · groups, H / groups · S, D], rows pushed to the left, 0 behind their end."""
        rows, (heads, width) = len(self.mask_BW), x_NHD.shape[1:]
        if self.pushed_N is not None:
            x_NHD = x_NHD.new_zeros(rows * self.longest, heads, width).index_copy_(0, self.pushed_N, x_NHD)
        x = x_NHD.view(rows, self.longest, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
        return x.reshape(rows * groups, -1, width)

    def flat(self, x: Tensor, heads: int) -> Tensor:
        """The inverse of `grouped`."""
        rows, width = len(self.mask_BW), x.shape[-1]
        x = x.view(rows, -1, heads // (len(x) // rows), self.longest, width).permute(0, 3, 1, 2, 4)
        x_NHD = x.reshape(rows * self.longest, heads, width)
        return x_NHD if self.pushed_N is None else x_NHD[self.pushed_N]


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
        q, k, v, given = (places.grouped(x, groups) for x in (q_NHD, k_NGD, v_NGD, grads[0]))
        on_v = torch.bmm(weights.transpose(1, 2), given)
        on_weights = torch.bmm(given, v.transpose(1, 2))
        on_scores = torch.ops.aten._softmax_backward_data(on_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        on_q, on_k = torch.bmm(on_scores, k), torch.bmm(on_scores.transpose(1, 2), q)
        return places.flat(on_q, heads), places.flat(on_k, groups), places.flat(on_v, groups), None, None
