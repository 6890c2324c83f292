"""How likely a policy finds given answers, which beside its start is the reward that it implies: log π / π_ref."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.pairs import Pair
from align.models.backbone import answered, response_logprobs
from align.models.chunks import in_chunks
from align.models.finite import diverged

Row = tuple[list[int], int]
"""Tokens of prompt and answer, and where the answer begins."""


@torch.no_grad()
def answer_logprobs(model: Any, rows: Sequence[Row], pad_id: int, by_token: bool = False, size: int = 32) -> Tensor:
    """log π of each answer [N], on the CPU, under whatever adapter is active; `by_token`: its mean over tokens."""
    if not rows:
        return torch.zeros(0, device="cpu")
    device = next(model.parameters()).device
    rollout = answered([ids[:n] for ids, n in rows], [ids[n:] for ids, n in rows], pad_id, device)
    each = in_chunks(lambda part: response_logprobs(model, part, 1.0)[0].sum(-1), rollout, size).cpu()
    return each / torch.tensor([len(ids) - n for ids, n in rows], device="cpu") if by_token else each


def pair_logprobs(model: Any, pairs: Sequence[Pair], pad_id: int, by_token: bool = False) -> Tensor:
    """log π of the better and of the worse answer of each pair [M, 2], see `answer_logprobs`."""
    sides = [(p.chosen_ids, p.chosen_start) for p in pairs], [(p.rejected_ids, p.rejected_start) for p in pairs]
    return torch.stack([answer_logprobs(model, side, pad_id, by_token) for side in sides], -1)


def require_finite(found: Tensor, what: str, steps: int, lr: float, dtype: str) -> Tensor:
    """The same tensor.

    Args:
        found: logprobs, a row for each of `what`.
        steps: of training behind them.

    Raises:
        InputError: some are no numbers.
    """
    if count := int((~found.isfinite()).flatten(1).any(1).sum()):
        problem = f"{count} of {len(found)} held-out {what} have logprobs that are no numbers after step {steps}"
        raise diverged(f"{problem}: nothing is published", lr, dtype)
    return found
