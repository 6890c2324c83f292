"""The operations of a Llama-like layer as autograd functions with explicit backward passes.

They compute the same as transformers' modules with fewer operations, and keep less for the backward pass: a norm its
input and one number for each token, the gated unit its two inputs, a projection its input. No gradient is computed for
frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from align.ops.linear import linear

if TYPE_CHECKING:
    from align.models.fastpath.packed import PackedIndex


class RmsNorm(torch.autograd.Function):
    """RMS norm over the last dimension, x / √(mean x² + eps) · weight, in fp32, rounded once (Zhang and Sennrich,
    2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return torch.nn.functional.rms_norm(x, weight_D.shape, weight_D, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        wide = to_fp32(x)
        scaled_grad = to_fp32(grads[0]) * weight_D
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        unit = wide * inverse
        on_weight = None
        if ctx.needs_input_grad[1]:
            on_weight = (grads[0] * unit).flatten(0, -2).sum(0).to(weight_D.dtype)
        along = (scaled_grad * unit).mean(-1, keepdim=True)
        return scaled_grad.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), on_weight, None


rms_norm: Callable[[Tensor, Tensor, float], Tensor] = RmsNorm.apply


def to_fp32(x: Tensor) -> Tensor:
    """Convert a tensor to fp32, or return it unchanged if its dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Rotate(torch.autograd.Function):
    """Rotary position embedding of heads x [N, H, D]. The pairs (i, i + D/2) are rotated by the angle of i at the
    token's position (Su et al., RoFormer, 2021).

    The second half of cos and sin [N, D] repeats the first. The inverse turns the other way.
    """

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        ctx.save_for_backward(cos_ND, sin_ND)
        return rotate_pairs(x_NHD, cos_ND, sin_ND, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_ND, sin_ND = ctx.saved_tensors
        return rotate_pairs(grads[0], cos_ND, sin_ND, -1.0), None, None


rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = Rotate.apply


def rotate_pairs(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, sign: float) -> Tensor:
    half = x_NHD.shape[-1] // 2
    out = x_NHD * cos_ND[:, None]
    sin = sin_ND[:, None, :half]
    out[..., :half].addcmul_(x_NHD[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x_NHD[..., :half], sin, value=sign)
    return out


class SwiGlu(torch.autograd.Function):
    """Gated unit silu(gate) · up (Shazeer, 2020), which saves only its two inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), grads[0] * silu(gate)


swiglu: Callable[[Tensor, Tensor], Tensor] = SwiGlu.apply


class LowRank(NamedTuple):
    """The LoRA factors A [r, in] and B [out, r] of a matrix, whose product s · B A is added (Hu et al., LoRA, 2021)."""

    a: Tensor
    b: Tensor
    scaling: float


class Matrix(NamedTuple):
    """The weight of a linear layer with its LoRA factors, W + s · B A.

    Attributes:
        weight: dtype → W [out, in] in that dtype; called once for each pass, because W may be stored quantised.
        shape: (out, in).
        bias: [out], or None.
        trained: W if it requires a gradient; else None.
    """

    weight: Callable[[torch.dtype], Tensor]
    shape: tuple[int, int]
    bias: Tensor | None = None
    low: LowRank | None = None
    trained: Tensor | None = None


class Recompute(NamedTuple):
    """A function that recomputes a tensor in the backward pass, and its inputs, which are saved anyway."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def apply_matrices(x_NI: Tensor, matrices: Sequence[Matrix], recompute: Recompute | None = None) -> tuple[Tensor, ...]:
    """Multiply x by several matrices with their LoRA factors, and return one product [N, out] for each.

    The low-rank product is computed in the dtype of x, and added by the matrix product itself. A and B get gradients in
    their own dtype.

    Args:
        recompute: recomputes x in the backward pass, so that x is not saved.
    """
    if not torch.is_grad_enabled():
        return multiply(x_NI, matrices)[0]
    factors = [t for m in matrices for t in (m.trained, m.bias, *(m.low[:2] if m.low else (None, None)))]
    return ApplyMatrices.apply(x_NI, tuple(matrices), recompute, *factors)  # pyright: ignore[reportReturnType]


def multiply(x_NI: Tensor, matrices: Sequence[Matrix]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Multiply x by several matrices and add their LoRA products, without the autograd function of `apply_matrices`.
    Also returns x times all A, concatenated [N, Σ r], or None if no matrix has LoRA factors."""
    outputs = tuple(linear(x_NI, m.weight(x_NI.dtype), m.bias) for m in matrices)
    adapted = [(out, m.low) for out, m in zip(outputs, matrices, strict=True) if m.low]
    if not adapted:
        return outputs, None
    x_through_a = linear(x_NI, concatenate_a([low for _, low in adapted], x_NI.dtype))
    lows = x_through_a.split([len(low.a) for _, low in adapted], 1)
    for (out, low), x_low in zip(adapted, lows, strict=True):
        out.addmm_(x_low, low.b.to(x_NI.dtype).t(), alpha=low.scaling)
    return outputs, x_through_a


def concatenate_a(lows: Sequence[LowRank], dtype: torch.dtype) -> Tensor:
    """Concatenate the A factors of several adapters along their rows, cast to `dtype`."""
    return (lows[0].a if len(lows) == 1 else torch.cat([low.a for low in lows])).to(dtype)


class ApplyMatrices(torch.autograd.Function):
    """Autograd function that multiplies x by several matrices with their LoRA factors, used by `apply_matrices`. Its
    three arguments are followed by W, bias, A and B of each matrix, with None for a missing one and for a W that does
    not train."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrices: tuple[Matrix, ...], recompute: Recompute | None, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, x_through_a = multiply(x, matrices)
        ctx.weights = [m.weight for m in matrices]
        ctx.scalings = [m.low.scaling if m.low else 0.0 for m in matrices]
        ctx.recompute = recompute and recompute.function
        ctx.dtype = x.dtype
        ctx.save_for_backward(x_through_a, *factors, *(recompute.inputs if recompute else (x,)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_through_a, *kept = ctx.saved_tensors
        x_needed, _, _, *needed = ctx.needs_input_grad
        factors = kept[: len(needed)]
        x, *more = kept[len(needed) :]
        if ctx.recompute and any((*needed[::4], *needed[2::4])):
            x = ctx.recompute(x, *more)
        on_x: Any = None
        further_products: list[Tensor] = []
        if x_needed:
            products = (linear(grad, weight(ctx.dtype).t()) for grad, weight in zip(grads, ctx.weights, strict=True))
            on_x, *further_products = products
        on_factors: list[Tensor | None] = []
        first = 0
        for i, (grad, scaling) in enumerate(zip(grads, ctx.scalings, strict=True)):
            a, b = factors[4 * i + 2 : 4 * i + 4]
            weight_needed, bias_needed, a_needed, b_needed = needed[4 * i : 4 * i + 4]
            on_factors.append(linear(grad.t(), x.t()) if weight_needed else None)
            on_factors.append(grad.sum(0) if bias_needed else None)
            if a is None:
                on_factors += (None, None)
                continue
            on_low = (grad @ b.to(ctx.dtype)).mul_(scaling)
            if x_needed:
                on_x.addmm_(on_low, a.to(ctx.dtype))
            on_factors.append((on_low.t() @ x).to(a.dtype) if a_needed else None)
            low = x_through_a[:, first : first + len(a)]
            on_factors.append((grad.t() @ low).mul_(scaling).to(b.dtype) if b_needed else None)
            first += len(a)
        for product in further_products:
            on_x.add_(product)
        return on_x, None, None, *on_factors


class Causal(torch.autograd.Function):
    """Causal attention over rows of different lengths by plain matrix products. Returns the output of every token [N,
    H, D].

        softmax(s · Q_h K_gᵀ, each token to itself and those before it) V_g

    (Vaswani et al., 2017; a key for several queries, Ainslie et al., GQA, 2023.) torch's fused kernel for CPUs is made
    for long rows: at 16 rows of 68 tokens in bf16, forward and backward take 11 ms for each layer, and these plain
    products 2 ms. The softmax is computed in fp32, and its weights are stored and multiplied in the dtype of the
    values, as in the fused kernel.

    Its arguments are queries [N, H, D]; keys and values [N, G, D], a group for H / G heads; the index of
    the tokens; and the scale, usually D^−½.
    """

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, index: PackedIndex, scale: float) -> Tensor:
        groups = k_NGD.shape[1]
        columns = index.longest
        q, k, v = (index.to_groups(index.expand(x), groups) for x in (q_NHD, k_NGD, v_NGD))
        wide = torch.promote_types(q.dtype, torch.float32)
        future = q.new_full((columns, columns), float("-inf"), dtype=wide).triu_(1).repeat(q.shape[1] // columns, 1)
        scores = torch.baddbmm(future, q.to(wide), k.to(wide).transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1).to(v.dtype)
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, weights)
        ctx.index = index
        ctx.scale = scale
        return index.reduce(index.from_groups(torch.bmm(weights, v), q_NHD.shape[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, weights = ctx.saved_tensors
        index = ctx.index
        groups = k_NGD.shape[1]
        q, k, v = (index.to_groups(index.expand(x), groups) for x in (q_NHD, k_NGD, v_NGD))
        # If several rows share a token, only one row's output was used.
        grad = index.to_groups(index.expand_once(grads[0]), groups)
        on_v = torch.bmm(weights.transpose(1, 2), grad)
        on_weights = torch.bmm(grad, v.transpose(1, 2))
        on_scores = torch.ops.aten._softmax_backward_data(on_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        on_q = torch.bmm(on_scores, k)
        on_k = torch.bmm(on_scores.transpose(1, 2), q)
        return (
            index.reduce(index.from_groups(on_q, q_NHD.shape[1])),
            index.reduce_by_sum(index.from_groups(on_k, groups)),
            index.reduce_by_sum(index.from_groups(on_v, groups)),
            None,
            None,
        )


class CausalByRow(torch.autograd.Function):
    """Causal attention computed one row at a time by torch's fused kernel, which does not save attention weights.

    Memory grows with the length of a row instead of its square, and no padding is computed.
    """

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, index: PackedIndex, scale: float) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        rows = [kernel(*row, 0.0, True, scale=scale) for row in split_rows(q_NHD, k_NGD, v_NGD, index)]
        out_NHD = index.reduce(torch.cat([out[0].transpose(0, 1) for out, _ in rows]))
        # The following projection saves the output too, so that it takes no additional memory.
        ctx.save_for_backward(q_NHD, k_NGD, v_NGD, out_NHD, *(normaliser for _, normaliser in rows))
        ctx.index = index
        ctx.scale = scale
        return out_NHD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHD, k_NGD, v_NGD, out_NHD, *normalisers = ctx.saved_tensors
        index = ctx.index
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        lengths = [length for length in index.lengths() if length]
        out_rows, grad_rows = (
            [row.transpose(0, 1)[None] for row in x_AHD.split(lengths)]
            for x_AHD in (index.expand(out_NHD), index.expand_once(grads[0]))
        )
        row_grads = [
            kernel(grad, *row, out, normaliser, 0.0, True, scale=ctx.scale)
            for row, out, grad, normaliser in zip(
                split_rows(q_NHD, k_NGD, v_NGD, index), out_rows, grad_rows, normalisers, strict=True
            )
        ]
        on_q, on_k, on_v = (
            torch.cat([grad[0].transpose(0, 1) for grad in row]) for row in zip(*row_grads, strict=True)
        )
        on_k, on_v = (on_x.unflatten(1, (k_NGD.shape[1], -1)).sum(2) for on_x in (on_k, on_v))
        return index.reduce(on_q), index.reduce_by_sum(on_k), index.reduce_by_sum(on_v), None, None


Attention = Callable[[Tensor, Tensor, Tensor, "PackedIndex", float], Tensor]
causal_attention: Attention = Causal.apply
causal_attention_by_row: Attention = CausalByRow.apply


def split_rows(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, index: PackedIndex
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the queries, keys and values [1, H, S, D] of each row with tokens, with a key and value for every query
    head."""
    lengths = [length for length in index.lengths() if length]
    queries_per_key = q_NHD.shape[1] // k_NGD.shape[1]
    # The kernel reads a last dimension with a stride of 1, and does not check it.
    q_rows, k_rows, v_rows = (index.expand(x).contiguous().split(lengths) for x in (q_NHD, k_NGD, v_NGD))
    for q, k, v in zip(q_rows, k_rows, v_rows, strict=True):
        k, v = (x.repeat_interleave(queries_per_key, 1) for x in (k, v))
        yield q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]
