"""The loss of what is held out, measured the same way whatever trained the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from align.data.chat import IGNORED, Encoded
from align.models.backbone import pad, picked_logprobs


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int = 16) -> tuple[float, int]:
    """Mean negative log-likelihood over the trained tokens of `rows`, in nats, and how many tokens that was.

    Rows are batched by length, so little padding is computed; the mean is over tokens, whatever the batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda r: len(r.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        tokens = pad([r.input_ids for r in batch], pad_id).to(device)
        mask = pad([[1] * len(r.input_ids) for r in batch], 0).bool().to(device)
        picked = (pad([r.labels for r in batch], IGNORED) != IGNORED).to(device)
        picked[:, 0] = False  # nothing stands before a first token
        logprobs, _, _ = picked_logprobs(model, tokens, mask, picked)
        total -= logprobs.sum().item()
        count += int(picked.sum())
    model.train(was_training)
    return total / count, count
