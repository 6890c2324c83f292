"""Log-probabilities of tokens from hidden states, without ever holding logits of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from align.ops.linear import linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LOGITS, ROWS = 1 << 20, 128
"""Logits held at once, 4 MB in fp32, which a cache still helps: 256 tokens of a vocabulary of 4,096. But so many tokens
at least, for a product with fewer is slow."""
GPU_LOGITS = 1 << 25
"""On a GPU, 128 MB in fp32: 220 tokens of a vocabulary of 152,000, and no more launches than that takes."""


def token_logprobs(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of the distribution it was drawn from, token by token.

    With logits z = head(h) / temperature:  log p(y) = z_y − logsumexp(z),  H = logsumexp(z) − Σ p·z.

    The logits of one chunk live at a time; under autograd each chunk is recomputed in the backward pass, so memory
    does not grow with the vocabulary times the batch.

    Args:
        hidden_ND: final hidden states, one row a predicted token. Row n predicts `targets_N[n]`.
        targets_N: token ids.
        head: the lm-head, hidden → logits.
        temperature: of the distribution that is meant; the same for sampling, old, new and reference logprobs.
        chunk: rows of logits held at once; by default as many as `rows_for` says.

    Returns:
        logprobs_N, entropy_N: fp32. The entropy carries no gradient.
    """

    def piece(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h).float() / temperature
        picked = logits.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        with torch.no_grad():
            return picked, described(logits, y)[2]

    if chunk is None:
        with torch.no_grad():
            chunk = rows_for(head(hidden_ND[:1]).shape[-1], hidden_ND.device)
    several = hidden_ND.shape[0] > chunk
    parts = [
        checkpoint(piece, h, y, use_reentrant=False) if several and torch.is_grad_enabled() else piece(h, y)
        for h, y in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.cat(logprobs), torch.cat(entropies)


def linear_logprobs(
    hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `token_logprobs` does for a head that is a frozen matrix and nothing more, z = W h / temperature.

    Its gradient is known as soon as the distribution is,

        ∂ log p(y) / ∂h = −Σ_v (p_v − [v = y]) W_v / temperature,

    so the sum is taken in the forward pass, chunk by chunk, and kept as [N, D]: no logits are kept or made twice. The
    one is subtracted in fp32, before anything is rounded to the dtype of W.

    Args:
        weight_VD: takes no gradient.
    """
    return linear_predictions(hidden_ND, targets_N, weight_VD, temperature, chunk)[:2]


def linear_predictions(
    hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logprobs and entropies of `linear_logprobs`, and the id of the likeliest token at each place [N]."""
    chunk = chunk or rows_for(weight_VD.shape[0], weight_VD.device)
    return Linear.apply(hidden_ND, targets_N, weight_VD, temperature, chunk)  # pyright: ignore[reportReturnType]


class Linear(torch.autograd.Function):
    """The autograd function of `linear_predictions`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        parts = []
        for h, y in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
            logits = linear(h, weight_VD).float()
            if temperature != 1.0:
                logits /= temperature
            picked, p, entropy, likeliest = described(logits, y)
            pull = None
            if wanted:
                p.scatter_add_(
                    1, y[:, None], p.new_full((len(y), 1), -1.0)
                )  # in fp32: rounded first, 0.999 is 1 in bf16
                if temperature != 1.0:
                    p /= temperature  # before it is rounded: of fp16, small numbers lose digits
                pull = linear(p.to(weight_VD.dtype), weight_VD.t())
            parts.append((picked, entropy, likeliest, pull))
            del logits, p  # beside the next chunk's they would be one more
        logprobs, entropies, likeliest_ids, pulls = zip(*parts, strict=True)
        if wanted:
            ctx.save_for_backward(torch.cat(pulls))
        entropy = torch.cat(entropies)
        likeliest_N = torch.cat(likeliest_ids)
        ctx.mark_non_differentiable(entropy, likeliest_N)
        return torch.cat(logprobs), entropy, likeliest_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (pull_ND,) = ctx.saved_tensors
        return (-grads[0][:, None] * pull_ND).to(pull_ND.dtype), None, None, None, None


def described(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log p of the targets [N], p [N, V], the entropies [N] and the likeliest tokens [N], without a gradient.

    One pass over the logits by a fused kernel, where logsumexp takes five: the normaliser is that of the likeliest
    token, whose p is too large to underflow.
    """
    with torch.autocast(logits_NV.device.type, enabled=False):  # it would take the sum over p in bf16
        return _described(logits_NV, targets_N)


def _described(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p_NV = logits_NV.softmax(-1)
    top_N, at_N = logits_NV.max(-1)
    normaliser_N = top_N - p_NV.gather(-1, at_N[:, None]).squeeze(-1).log()
    picked_N = logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - normaliser_N
    return picked_N, p_NV, normaliser_N - torch.linalg.vecdot(p_NV, logits_NV), at_N


def rows_for(vocabulary: int, device: torch.device) -> int:
    """Rows of logits held at once."""
    return max(ROWS, (LOGITS if device.type == "cpu" else GPU_LOGITS) // vocabulary)
