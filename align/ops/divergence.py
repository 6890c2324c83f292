"""How far the predictions of two models lie apart on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

DIVERGENCE_ELEMENTS = 1 << 23
"""Logits compared at once (64 MB of fp64 a tensor): all of a batch at a 150k vocabulary would not fit."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one model's predictions lie from another's on the same tokens.

    Attributes:
        kl: mean KL(a || b) a token, in nats.
        top1: share of tokens on which both would pick the same next token.
        max_logprob: largest absolute difference of any token's logprob, in nats.
        tokens: tokens compared.
    """

    kl: float
    top1: float
    max_logprob: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def kl_between(logits_a: Tensor, logits_b: Tensor, mask: Tensor) -> Divergence:
    """KL(a || b) = Σ_v p_a(v) (log p_a(v) − log p_b(v)), averaged over tokens; in fp64, a chunk at a time.

    In fp32 the rounding of a 150k-term sum is as large as the divergence of a faithful merge.

    Args:
        logits_a: [B, S, V], of the model taken as the truth.
        logits_b: [B, S, V].
        mask: [B, S], True on the positions to compare.

    Raises:
        ValueError: shapes differ, or the mask selects nothing.
    """
    if logits_a.shape != logits_b.shape or mask.shape != logits_a.shape[:-1]:
        shapes = f"{tuple(logits_a.shape)}, {tuple(logits_b.shape)} and mask {tuple(mask.shape)}"
        raise ValueError(f"shapes {shapes} do not belong together")
    rows = mask.reshape(-1).bool().nonzero().squeeze(-1)
    if not len(rows):
        raise ValueError("the mask selects no token to compare")
    flat_a, flat_b = (logits.reshape(-1, logits.shape[-1]) for logits in (logits_a, logits_b))
    kl = same = 0.0
    largest = 0.0
    for index in rows.split(max(1, DIVERGENCE_ELEMENTS // logits_a.shape[-1])):
        a, b = (flat[index.to(flat.device)].double().cpu().log_softmax(-1) for flat in (flat_a, flat_b))
        # A token both rule out (-inf) differs by nothing, and one that a rules out adds nothing to its KL.
        difference = torch.where(a == b, 0.0, a - b)
        kl += torch.where(a.isneginf(), 0.0, a.exp() * difference).sum().item()
        same += (a.argmax(-1) == b.argmax(-1)).sum().item()
        largest = worst((largest, difference.abs().max().item()))
    return Divergence(kl / len(rows), same / len(rows), largest, len(rows))


def pooled_divergence(logits_a: Sequence[Tensor], logits_b: Sequence[Tensor]) -> Divergence:
    """Return KL(a || b) and its kin over every position of several texts, [S, V] logits each."""
    pairs = zip(logits_a, logits_b, strict=True)
    return pooled([kl_between(a[None], b[None], torch.ones(1, len(a), device=a.device)) for a, b in pairs])


def pooled(parts: Sequence[Divergence]) -> Divergence:
    """Several comparisons as one: means over all tokens, the largest of the largest."""
    tokens = sum(p.tokens for p in parts)

    def mean(name: str) -> float:
        return sum(getattr(p, name) * p.tokens for p in parts) / tokens

    return Divergence(mean("kl"), mean("top1"), worst(p.max_logprob for p in parts), tokens)


def worst(values: Iterable[float]) -> float:
    """The largest; nan where one is, which Python's `max` would lose."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)
