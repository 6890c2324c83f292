"""Divergence of two models' predictions on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

DIVERGENCE_ELEMENTS = 1 << 23
"""Number of logits compared at once (64 MB of fp64 a tensor). A whole batch with a vocabulary of 150k would not fit."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The divergence of a model b from a reference model a on the same tokens.

    Attributes:
        kl: mean KL(a || b) a token, in nats.
        top1: share of tokens for which both models predict the same token as the likeliest.
        max_logprob: largest absolute difference of any token's logprob, in nats.
        tokens: number of tokens compared.
    """

    kl: float
    top1: float
    max_logprob: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def kl_between(reference_logits: Tensor, model_logits: Tensor, mask: Tensor) -> Divergence:
    """Compute the divergence of a model's logits from a reference's at the masked positions, averaged over tokens. KL(a
    || b) is Σ_v p_a(v) (log p_a(v) − log p_b(v)).

    It is computed in fp64, a chunk at a time: in fp32 the rounding of a 150k-term sum is as large as the divergence of
    a correct merge.

    Args:
        reference_logits: [B, S, V], of the reference model.
        model_logits: [B, S, V].
        mask: [B, S], True at the positions to compare.

    Raises:
        ValueError: shapes differ, or the mask selects nothing.
    """
    if reference_logits.shape != model_logits.shape or mask.shape != reference_logits.shape[:-1]:
        shapes = f"{tuple(reference_logits.shape)}, {tuple(model_logits.shape)} and mask {tuple(mask.shape)}"
        raise ValueError(f"shapes {shapes} do not belong together")
    rows = mask.reshape(-1).bool().nonzero().squeeze(-1)
    if not len(rows):
        raise ValueError("the mask selects no token to compare")
    flat_a = reference_logits.reshape(-1, reference_logits.shape[-1])
    flat_b = model_logits.reshape(-1, model_logits.shape[-1])
    kl = 0.0
    same = 0.0
    largest = 0.0
    for index in rows.split(max(1, DIVERGENCE_ELEMENTS // reference_logits.shape[-1])):
        a, b = (flat[index.to(flat.device)].double().cpu().log_softmax(-1) for flat in (flat_a, flat_b))
        # A token with probability 0 in both models does not differ, and one with probability 0 in a adds no KL.
        difference = torch.where(a == b, 0.0, a - b)
        kl += torch.where(a.isneginf(), 0.0, a.exp() * difference).sum().item()
        same += (a.argmax(-1) == b.argmax(-1)).sum().item()
        largest = max_or_nan((largest, difference.abs().max().item()))
    return Divergence(kl / len(rows), same / len(rows), largest, len(rows))


def compute_divergence(reference_logits: Sequence[Tensor], model_logits: Sequence[Tensor]) -> Divergence:
    """Compute the divergence of a model from a reference over all tokens of several texts, with one logits tensor [S,
    V] per text. KL and agreement are means over all tokens, and the largest difference is that of all."""
    pairs = zip(reference_logits, model_logits, strict=True)
    parts = [kl_between(a[None], b[None], torch.ones(1, len(a), device=a.device)) for a, b in pairs]
    tokens = sum(part.tokens for part in parts)
    kl = sum(part.kl * part.tokens for part in parts) / tokens
    top1 = sum(part.top1 * part.tokens for part in parts) / tokens
    return Divergence(kl, top1, max_or_nan([part.max_logprob for part in parts]), tokens)


def max_or_nan(values: Sequence[float]) -> float:
    """Return the largest value, or nan if any value is nan: Python's `max` may lose it."""
    return math.nan if any(map(math.isnan, values)) else max(values)
