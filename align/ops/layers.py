"""The pieces of a Llama-like layer, each with a backward pass that is written out.

They compute what transformers' modules compute, in fewer operations, and keep less for the backward pass: of a norm its
input and one number a token, of the gated unit its two inputs, of a projection its input. What is frozen gets no
gradient and costs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import silu

from align.ops.linear import linear

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last dimension, in fp32, rounded once (Zhang and Sennrich, 2019).

    Args:
        weight_D: takes no gradient.
    """
    return RmsNorm.apply(x, weight_D, eps)  # pyright: ignore[reportReturnType]


class RmsNorm(torch.autograd.Function):
    """`rms_norm` as autograd takes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return torch.nn.functional.rms_norm(x, weight_D.shape, weight_D, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D = ctx.saved_tensors
        wide, given = widened(x), widened(grads[0]) * weight_D
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        unit = wide * inverse
        along = (given * unit).mean(-1, keepdim=True)
        return given.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), None, None


def widened(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotated(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Each head turned by its token's position: the pairs (i, i + D/2) by the angle of i (Su et al., RoFormer, 2021).

    Args:
        cos_ND, sin_ND: of the angles, the second half repeats the first.
    """
    return Rotated.apply(x_NHD, cos_ND, sin_ND)  # pyright: ignore[reportReturnType]


class Rotated(torch.autograd.Function):
    """`rotated` as autograd takes it: its inverse turns the other way."""

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
        ctx.save_for_backward(cos_ND, sin_ND)
        return turn(x_NHD, cos_ND, sin_ND, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_ND, sin_ND = ctx.saved_tensors
        return turn(grads[0], cos_ND, sin_ND, -1.0), None, None


def turn(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, sign: float) -> Tensor:
    half = x_NHD.shape[-1] // 2
    out = x_NHD * cos_ND[:, None]
    sin = sin_ND[:, None, :half]
    out[..., :half].addcmul_(x_NHD[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x_NHD[..., :half], sin, value=sign)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer, 2020)."""
    return SwiGlu.apply(gate, up)  # pyright: ignore[reportReturnType]


class SwiGlu(torch.autograd.Function):
    """`swiglu` as autograd takes it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), grads[0] * silu(gate)


class LowRank(NamedTuple):
    """What is added to a frozen matrix: s · B A (Hu et al., LoRA, 2021), with A [r, in] and B [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float


class Matrix(NamedTuple):
    """A frozen linear layer, W + s · B A.

    Attributes:
        weight: gives W [out, in] in a dtype; called once a pass, for W may be kept quantised.
        elements: out · in.
        bias: [out], or None.
    """

    weight: Callable[[torch.dtype], Tensor]
    elements: int
    bias: Tensor | None = None
    low: LowRank | None = None


def projected(
    x_NI: Tensor, matrices: Sequence[Matrix], again: Callable[[], Tensor] | None = None
) -> tuple[Tensor, ...]:
    """x through several matrices that read the same input: one [N, out] each.

    The low-rank product is taken in the dtype of x and added by the product itself. Only A and B get gradients, in
    their own dtype, and x.

    Args:
        again: makes x once more in the backward pass, where that is cheap; x is not kept for it then.
    """
    if not torch.is_grad_enabled():
        return project(x_NI, matrices)[0]
    factors = [t for m in matrices if m.low for t in (m.low.a, m.low.b)]
    return Projected.apply(x_NI, tuple(matrices), again, *factors)  # pyright: ignore[reportReturnType]


def project(x_NI: Tensor, matrices: Sequence[Matrix]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """`projected` without a gradient; and x through all A, side by side [N, Σ r]."""
    outputs = tuple(linear(x_NI, m.weight(x_NI.dtype), m.bias) for m in matrices)
    adapted = [(out, m.low) for out, m in zip(outputs, matrices, strict=True) if m.low]
    if not adapted:
        return outputs, None
    x_through_a = linear(x_NI, stacked([low for _, low in adapted], x_NI.dtype))
    first = 0
    for out, low in adapted:
        last = first + len(low.a)
        out.addmm_(x_through_a[:, first:last], low.b.to(x_NI.dtype).t(), alpha=low.scaling)
        first = last
    return outputs, x_through_a


def stacked(lows: Sequence[LowRank], dtype: torch.dtype) -> Tensor:
    """All A, one below the other."""
    return (lows[0].a if len(lows) == 1 else torch.cat([low.a for low in lows])).to(dtype)


class Projected(torch.autograd.Function):
    """`projected` as autograd takes it: a gradient for x, and for A and B of each matrix that has them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrices: tuple[Matrix, ...], again: Callable[[], Tensor] | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, x_through_a = project(x, matrices)
        ctx.scalings = [m.low.scaling if m.low else None for m in matrices]
        ctx.weights = [m.weight for m in matrices]
        ctx.again, ctx.dtype = again, x.dtype
        ctx.save_for_backward(None if again else x, x_through_a, *factors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, x_through_a, *factors = ctx.saved_tensors
        (x_wanted, _, _, *wanted), dtype = ctx.needs_input_grad, ctx.dtype
        on_x = [linear(given, weight(dtype).t()) for given, weight in zip(grads, ctx.weights, strict=True) if x_wanted]
        given = iter(factors)
        adapted = [
            (on_out, LowRank(next(given), next(given), scaling))
            for on_out, scaling in zip(grads, ctx.scalings, strict=True)
            if scaling is not None
        ]
        on_factors: list[Tensor | None] = [None] * len(factors)
        if adapted:
            lows, ranks = [low for _, low in adapted], [len(low.a) for _, low in adapted]
            on_low = torch.cat([(on_out @ low.b.to(dtype)).mul_(low.scaling) for on_out, low in adapted], 1)
            if x_wanted:
                on_x[0].addmm_(on_low, stacked(lows, dtype))
            if any(wanted[::2]):
                on_a = on_low.t() @ (ctx.again() if x is None else x)
                on_factors[::2] = [part.to(low.a.dtype) for part, low in zip(on_a.split(ranks), lows, strict=True)]
            if any(wanted[1::2]):
                on_factors[1::2] = [
                    (on_out.t() @ part).mul_(low.scaling).to(low.b.dtype)
                    for (on_out, low), part in zip(adapted, x_through_a.split(ranks, 1), strict=True)
                ]
        for more in on_x[1:]:
            on_x[0].add_(more)
        return on_x[0] if on_x else None, None, None, *on_factors
