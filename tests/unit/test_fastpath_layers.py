"""Values and gradients of a layer's parts agree with their formulas in fp64."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from align.models.fastpath.layers import (
    LowRank,
    Matrix,
    Recompute,
    apply_matrices,
    causal_attention,
    causal_attention_by_row,
    rms_norm,
    rotate,
    swiglu,
    to_fp32,
)
from align.models.fastpath.packed import PackedIndex
from align.ops import linear as linear_module
from align.ops.linear import linear, pack_weight


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def require_gradients(*tensors: Tensor) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors]


def test_rms_norm():
    x, weight = require_gradients(random(2, 5, 8), random(8, seed=1))
    assert_close(rms_norm(x, weight, 1e-3), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight)
    assert gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


@pytest.mark.parametrize("again", [False, True])
def test_projected_gives_outputs_and_the_gradients_of_what_trains(again: bool):
    sizes = [(2, 8), (6, 2), (3, 8), (4, 3), (7, 8), (7,)]
    x, *trained = require_gradients(random(5, 8), *(random(*size, seed=i) for i, size in enumerate(sizes)))
    first_weight = random(6, 8, seed=10)
    last_weight = random(4, 8, seed=11)

    def build_matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor, weight: Tensor, bias: Tensor) -> list[Matrix]:
        return [
            Matrix(first_weight.to, (6, 8), low=LowRank(a, b, 0.5)),
            Matrix(weight.to, (7, 8), bias, trained=weight),
            Matrix(last_weight.to, (4, 8), low=LowRank(c, d, 2.0)),
        ]

    def compute_outputs(x: Tensor, *trained: Tensor) -> tuple[Tensor, ...]:
        y = x * 1.0
        return apply_matrices(y, build_matrices(*trained), Recompute(torch.neg, (-y.detach(),)) if again else None)

    a, b, c, d, weight, bias = trained
    expected = (
        x @ first_weight.T + 0.5 * x @ a.T @ b.T,
        x @ weight.T + bias,
        x @ last_weight.T + 2.0 * x @ c.T @ d.T,
    )
    for output, expected_output in zip(compute_outputs(x, *trained), expected, strict=True):
        assert_close(output, expected_output)
    assert gradcheck(compute_outputs, (x, *trained))
    with torch.no_grad():
        for output, expected_output in zip(apply_matrices(x, build_matrices(*trained)), expected, strict=True):
            assert_close(output, expected_output)


def test_what_is_frozen_gets_no_gradient():
    x = random(5, 8)
    a = random(2, 8)
    b = require_gradients(random(6, 2))[0]
    (out,) = apply_matrices(x, [Matrix(random(6, 8, seed=3).to, (6, 8), low=LowRank(a, b, 1.0))])
    out.sum().backward()
    assert b.grad is not None
    assert a.grad is None
    assert x.grad is None


def test_a_backward_pass_leaves_nothing_of_what_was_kept_for_it():
    y = require_gradients(random(5, 8))[0] * 1.0
    recompute_input = -y.detach()
    weak_reference = weakref.ref(recompute_input)
    (out,) = apply_matrices(y, [Matrix(random(6, 8).to, (6, 8))], Recompute(torch.neg, (recompute_input,)))
    del recompute_input
    assert weak_reference() is not None
    out.sum().backward()
    assert weak_reference() is None
    assert out.grad_fn is not None  # the result still exists, and may do so for long


# Attention.

RAGGED = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)


def attend_token_by_token(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Compute attention for each token of each row and head by itself."""
    output = torch.zeros_like(q)
    start = 0
    for length in lengths:
        for t in range(length):
            for h in range(q.shape[1]):
                g = h * k.shape[1] // q.shape[1]
                row = slice(start, start + t + 1)
                output[start + t, h] = (scale * k[row, g] @ q[start + t, h]).softmax(-1) @ v[row, g]
        start += length
    return output


@pytest.mark.parametrize("mask", [RAGGED, torch.ones(2, 4, dtype=torch.bool)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention(mask: Tensor, groups: int):
    count = int(mask.sum())
    q, k, v = require_gradients(random(count, 4, 6), random(count, groups, 6, seed=1), random(count, groups, 6, seed=2))
    places = PackedIndex.build(mask)
    with torch.no_grad():
        expected = attend_token_by_token(q, k, v, mask.sum(1).tolist(), 0.3)
        assert_close(causal_attention(q, k, v, places, 0.3), expected)
    assert gradcheck(lambda *x: causal_attention(*x, places, 0.3), (q, k, v))


@pytest.mark.parametrize("mask", [RAGGED, torch.ones(2, 4, dtype=torch.bool), torch.tensor([[1, 1], [0, 0]]).bool()])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_by_row(mask: Tensor, groups: int):
    count = int(mask.sum())
    q, k, v = require_gradients(random(count, 4, 6), random(count, groups, 6, seed=1), random(count, groups, 6, seed=2))
    places = PackedIndex.build(mask)
    with torch.no_grad():
        expected = attend_token_by_token(q, k, v, mask.sum(1).tolist(), 0.3)
        assert_close(causal_attention_by_row(q, k, v, places, 0.3), expected)
    assert gradcheck(lambda *x: causal_attention_by_row(*x, places, 0.3), (q, k, v))


def test_attention_by_row_reads_strided_inputs():
    places = PackedIndex.build(RAGGED)
    inputs = [random(int(RAGGED.sum()), 6, 4, seed=seed).transpose(1, 2) for seed in (0, 1, 2)]
    expected = causal_attention(*inputs, places, 0.3)
    assert_close(causal_attention_by_row(*inputs, places, 0.3), expected)


def test_attention_in_bf16_is_that_of_the_fused_kernel_up_to_rounding():
    q, k, v = (random(4 * 9, h, 16, seed=h, dtype=torch.bfloat16).requires_grad_() for h in (6, 2, 2))
    output = causal_attention(q, k, v, PackedIndex.build(torch.ones(4, 9, dtype=torch.bool)), 0.25)
    rows = (t.view(4, 9, -1, 16).transpose(1, 2).double() for t in (q, k, v))
    expected = nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=0.25, enable_gqa=True)
    assert_close(output.double(), expected.transpose(1, 2).reshape(36, 6, 16), atol=0.02, rtol=0.02)


def compute_plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention over 4 rows of 16 tokens as transformers' eager code does, softmax in fp32 at least."""
    q, k, v = (x.view(4, 16, 2, 8).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * 0.3 + torch.full((16, 16), float("-inf"), dtype=q.dtype).triu(1)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2).reshape(64, 2, 8)


def compute_plain_rms_norm(x: Tensor) -> Tensor:
    x_fp32 = to_fp32(x)
    return (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate_plainly(x: Tensor) -> Tensor:
    rotated = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
    return x * COS.to(x.dtype)[:, None] + rotated * SIN.to(x.dtype)[:, None]


ANGLES = torch.arange(64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
COS = ANGLES.cos()
SIN = ANGLES.sin()
ROWS_OF_16 = PackedIndex.build(torch.ones(4, 16, dtype=torch.bool))
PIECES = {
    "attention": (lambda *x: causal_attention(*x, ROWS_OF_16, 0.3), compute_plain_attention, 3),
    "rms_norm": (lambda x: rms_norm(x, torch.ones(8, dtype=x.dtype), 1e-6), compute_plain_rms_norm, 1),
    "rotated": (lambda x: rotate(x, COS.to(x.dtype), SIN.to(x.dtype)), rotate_plainly, 1),
    "swiglu": (swiglu, lambda gate, up: nn.functional.silu(gate) * up, 2),
}


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", PIECES)
def test_the_gradients_err_no_more_than_autograds(piece: str, dtype: torch.dtype, scale: float):
    ours, plain, count = PIECES[piece]
    inputs = [(scale * random(64, 2, 8, seed=i)).to(dtype) for i in range(count)]
    upstream = random(64, 2, 8, seed=9).to(dtype)

    def compute_gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).clone().requires_grad_() for x in inputs]
        function(*leaves).backward(upstream.to(dtype))
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    exact_gradients = compute_gradients(plain, torch.double)
    errors = [
        max(
            float((a - b).norm() / b.norm())
            for a, b in zip(compute_gradients(function, dtype), exact_gradients, strict=True)
        )
        for function in (ours, plain)
    ]
    assert errors[0] <= 1.15 * errors[1], errors


def test_places_go_there_and_back():
    places = PackedIndex.build(RAGGED)
    x = random(8, 2, 3)
    assert torch.equal(places.rectangle(x)[RAGGED], x)
    assert not places.rectangle(x)[~RAGGED].any()
    assert torch.equal(places.real(torch.arange(18).view(3, 6)), torch.arange(18).view(3, 6)[RAGGED])
    assert torch.equal(places.from_groups(places.to_groups(x, 2), 2), x)
    assert places.to_groups(x, 2).shape == (6, 4, 3)


# Products.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.double])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_linear_whatever_the_layout(dtype: torch.dtype, bias: bool):
    x = random(7, 48, dtype=dtype)
    weight = random(32, 48, seed=1, dtype=dtype)
    b = random(32, seed=2, dtype=dtype) if bias else None
    expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    tolerance = {"atol": 0.2 if dtype == torch.bfloat16 else 1e-5, "rtol": 0.01}
    for y in (x, x.T.contiguous().T, torch.cat((x, x), 1)[:, 48:]):
        for w in (weight, weight.T.contiguous().T, pack_weight(weight, 7)):
            output = linear(y, w, b)
            assert output.dtype == dtype
            assert_close(output.double(), expected, **tolerance)


def test_without_bf16_products_a_weight_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    """oneDNN does not pack weights for products that the processor lacks."""
    monkeypatch.setattr(linear_module, "has_bf16_products", lambda: False)
    weight = random(6, 8).bfloat16()
    assert pack_weight(weight, 7) is weight
    assert torch.equal(linear(random(5, 8).bfloat16(), pack_weight(weight, 7)), random(5, 8).bfloat16() @ weight.T)
