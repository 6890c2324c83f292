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
    """x / √(mean x² + eps) · weight over the last dimension, in fp32, rounded once (Zhang and Sennrich, 2019)."""
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
        wide, given = at_least_fp32(x), at_least_fp32(grads[0]) * weight_D
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        unit = wide * inverse
        on_weight = None
        if ctx.needs_input_grad[1]:
            on_weight = (grads[0] * unit).flatten(0, -2).sum(0).to(weight_D.dtype)
        along = (given * unit).mean(-1, keepdim=True)
        return given.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), on_weight, None


def at_least_fp32(x: Tensor) -> Tensor:
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
    """What is added to a matrix: s · B A (Hu et al., LoRA, 2021), with A [r, in] and B [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float


class Matrix(NamedTuple):
    """A linear layer, W + s · B A.

    Attributes:
        weight: gives W [out, in] in a dtype; called once a pass, for W may be kept quantised.
        shape: (out, in).
        bias: [out], or None.
        trained: W itself where it takes a gradient.
    """

    weight: Callable[[torch.dtype], Tensor]
    shape: tuple[int, int]
    bias: Tensor | None = None
    low: LowRank | None = None
    trained: Tensor | None = None


class Again(NamedTuple):
    """How to make a tensor once more: cheaper than keeping it for a backward pass, where what it is made of is kept
    anyhow."""

    made: Callable[..., Tensor]
    of: tuple[Tensor, ...]


def projected(x_NI: Tensor, matrices: Sequence[Matrix], again: Again | None = None) -> tuple[Tensor, ...]:
    """x through several matrices that read the same input: one [N, out] each.

    The low-rank product is taken in the dtype of x and added by the product itself; A and B get their gradients in
    their own dtype.

    Args:
        again: makes x in the backward pass; it is not kept then.
    """
    if not torch.is_grad_enabled():
        return project(x_NI, matrices)[0]
    factors = [t for m in matrices for t in (m.trained, m.bias, *(m.low[:2] if m.low else (None, None)))]
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
    """`projected` as autograd takes it. Behind its three arguments come W, bias, A and B of each matrix, None where
    there is none; a W that is given is one that trains."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrices: tuple[Matrix, ...], again: Again | None, *factors: Tensor | None
    ) -> tuple[Tensor, ...]:
        outputs, x_through_a = project(x, matrices)
        ctx.weights, ctx.scalings = zip(*((m.weight, m.low.scaling if m.low else 0.0) for m in matrices), strict=True)
        ctx.made, ctx.dtype, ctx.factors = again and again.made, x.dtype, len(factors)
        ctx.save_for_backward(x_through_a, *factors, *(again.of if again else (x,)))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_through_a, *kept = ctx.saved_tensors
        factors, (x, *more) = kept[: ctx.factors], kept[ctx.factors :]
        (x_wanted, _, _, *wanted), dtype = ctx.needs_input_grad, ctx.dtype
        if ctx.made and any((*wanted[::4], *wanted[2::4])):
            x = ctx.made(x, *more)
        on_x = [
            linear(on_out, weight(dtype).t()) for on_out, weight in zip(grads, ctx.weights, strict=True) if x_wanted
        ]
        on_factors: list[Tensor | None] = [None] * len(factors)
        first = 0
        for i, (on_out, scaling) in enumerate(zip(grads, ctx.scalings, strict=True)):
            a, b = factors[4 * i + 2 : 4 * i + 4]
            weight_wanted, bias_wanted, a_wanted, b_wanted = wanted[4 * i : 4 * i + 4]
            if weight_wanted:
                on_factors[4 * i] = linear(on_out.t(), x.t())
            if bias_wanted:
                on_factors[4 * i + 1] = on_out.sum(0)
            if a is None:
                continue
            on_low = (on_out @ b.to(dtype)).mul_(scaling)
            if x_wanted:
                on_x[0].addmm_(on_low, a.to(dtype))
            if a_wanted:
                on_factors[4 * i + 2] = (on_low.t() @ x).to(a.dtype)
            if b_wanted:
                low = x_through_a[:, first : first + len(a)]
                on_factors[4 * i + 3] = (on_out.t() @ low).mul_(scaling).to(b.dtype)
            first += len(a)
        for more in on_x[1:]:
            on_x[0].add_(more)
        return on_x[0] if on_x else None, None, None, *on_factors
