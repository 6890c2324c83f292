"""Log-probabilities of tokens from hidden states, without ever holding logits of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CHUNK = 512  # rows of logits held at once: 512 × 152k × 4 bytes are 300 MB at the largest vocabularies


def token_logprobs(
    hidden_ND: Tensor,
    targets_N: Tensor,
    head: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk: int = CHUNK,
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

    Returns:
        logprobs_N, entropy_N: fp32. The entropy carries no gradient.
    """

    def piece(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(h).float() / temperature
        normaliser = logits.logsumexp(-1)
        picked = logits.gather(-1, y[:, None]).squeeze(-1)
        with torch.no_grad():
            log_p = logits - normaliser[:, None]
            entropy = -(log_p.exp() * log_p).sum(-1)
        return picked - normaliser, entropy

    several = hidden_ND.shape[0] > chunk
    parts = [
        checkpoint(piece, h, y, use_reentrant=False) if several and torch.is_grad_enabled() else piece(h, y)
        for h, y in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)  # pyright: ignore[reportArgumentType]
    return torch.cat(logprobs), torch.cat(entropies)
