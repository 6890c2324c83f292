"""Log-probabilities of tokens from hidden states, without the logits of a whole batch in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from align.ops.linear import linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LOGITS = 1 << 20
"""Number of logits in memory at once on a CPU: 4 MB in fp32, which fits a cache; 256 tokens with a vocabulary of
4,096."""
ROWS = 128
"""Minimum number of tokens in a chunk, because products with fewer rows are slow."""
GPU_LOGITS = 1 << 25
"""Number of logits in memory at once on a GPU: 128 MB in fp32; 220 tokens with a vocabulary of 152,000. Fewer would
take more kernel launches."""


def token_logprobs(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target token and the entropy of its predicted distribution, from hidden
    states.

    With logits z = head(h) / temperature:  log p(y) = z_y − logsumexp(z),  H = logsumexp(z) − Σ p·z.

    The logits of one chunk are in memory at a time. Under autograd each chunk is recomputed in the backward pass, so
    memory does not grow with the vocabulary times the batch.

    Args:
        hidden_ND: final hidden states, one row for each predicted token. Row n predicts `targets_N[n]`.
        targets_N: token ids.
        head: the lm-head, hidden → logits.
        temperature: of the distribution; the same for sampling, old, new and reference logprobs.
        chunk: rows of logits in memory at once; None for the number of `choose_chunk_rows`.

    Returns:
        logprobs_N, entropy_N: fp32. The entropy carries no gradient.
    """

    def compute_chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h).float() / temperature
        logprobs = logits.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
        with torch.no_grad():
            return logprobs, analyse_logits(logits, y).entropies_N

    if chunk is None:
        with torch.no_grad():
            chunk = choose_chunk_rows(head(hidden_ND[:1]).shape[-1], hidden_ND.device)
    recompute = hidden_ND.shape[0] > chunk and torch.is_grad_enabled()
    parts = [
        checkpoint(compute_chunk, h, y, use_reentrant=False) if recompute else compute_chunk(h, y)
        for h, y in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.cat(logprobs), torch.cat(entropies)


def linear_logprobs(
    hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the logprobs and entropies of `token_logprobs` for an LM head that is one frozen matrix, z = W h /
    temperature.

    Its gradient is known as soon as the distribution is,

        ∂ log p(y) / ∂h = −Σ_v (p_v − [v = y]) W_v / temperature,

    so the sum is computed in the forward pass, chunk by chunk, and kept as [N, D]: logits are neither kept nor computed
    again. The [v = y] is subtracted in fp32, before rounding to the dtype of W.

    Args:
        weight_VD: gets no gradient.
    """
    return linear_predictions(hidden_ND, targets_N, weight_VD, temperature, chunk)[:2]


class TokenPredictions(NamedTuple):
    """The log-probability of each target token, the entropy of the predicted distribution, and the likeliest token's
    id."""

    logprobs_N: Tensor
    entropies_N: Tensor
    likeliest_N: Tensor


def linear_predictions(
    hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> TokenPredictions:
    """Compute the logprobs of target tokens, entropies and likeliest tokens from hidden states, for an LM head that is
    one frozen matrix."""
    chunk = chunk or choose_chunk_rows(weight_VD.shape[0], weight_VD.device)
    predictions: Any = LinearLogprobs.apply(hidden_ND, targets_N, weight_VD, temperature, chunk)
    return TokenPredictions(*predictions)


class LinearLogprobs(torch.autograd.Function):
    """The autograd function of `linear_predictions`, which computes the gradient in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        parts = []
        for h, y in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
            logits = linear(h, weight_VD).float()
            if temperature != 1.0:
                logits /= temperature
            logprobs, p, entropy, likeliest = analyse_logits(logits, y)
            gradient = None
            if needs_gradient:
                # Before p is rounded to the dtype of W: 0.999 is 1 in bf16, and small numbers lose digits in fp16.
                p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1.0))
                if temperature != 1.0:
                    p /= temperature
                gradient = linear(p.to(weight_VD.dtype), weight_VD.t())
            parts.append((logprobs, entropy, likeliest, gradient))
            del logits, p  # or they would be in memory beside those of the next chunk
        all_logprobs, entropies, likeliest_ids, gradients = zip(*parts, strict=True)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        entropy = torch.cat(entropies)
        likeliest_N = torch.cat(likeliest_ids)
        ctx.mark_non_differentiable(entropy, likeliest_N)
        return torch.cat(all_logprobs), entropy, likeliest_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (-grads[0][:, None] * gradient_ND).to(gradient_ND.dtype), None, None, None, None


class LogitStatistics(NamedTuple):
    """The results of one pass over logits for each row: log p of the target, all probabilities, the entropy and the
    likeliest token."""

    logprobs_N: Tensor
    probabilities_NV: Tensor
    entropies_N: Tensor
    likeliest_N: Tensor


def analyse_logits(logits_NV: Tensor, targets_N: Tensor) -> LogitStatistics:
    """Compute from each row of logits the target's logprob, all probabilities, the entropy and the likeliest token,
    without a gradient.

    A fused kernel needs one pass over the logits, where logsumexp takes five. The normaliser is computed from the
    likeliest token, whose p is too large to underflow.
    """
    with torch.autocast(logits_NV.device.type, enabled=False):  # it would sum over p in bf16
        p_NV = logits_NV.softmax(-1)
        largest_N, likeliest_N = logits_NV.max(-1)
        normaliser_N = largest_N - p_NV.gather(-1, likeliest_N[:, None]).squeeze(-1).log()
        logprobs_N = logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - normaliser_N
        entropies_N = normaliser_N - torch.linalg.vecdot(p_NV, logits_NV)
        return LogitStatistics(logprobs_N, p_NV, entropies_N, likeliest_N)


def choose_chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Return the number of tokens whose logits are computed at once, for a vocabulary size and a device."""
    return max(ROWS, (LOGITS if device.type == "cpu" else GPU_LOGITS) // vocabulary)
