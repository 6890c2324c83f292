"""The loss of what is held out, measured the same way whatever trained the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch

from align import ranks
from align.data.chat.encode import IGNORED, Encoded
from align.models.backbone import pad, picked_logprobs
from align.models.sharded import is_sharded
from align.ops.intervals import Interval, ratio


class HeldOutLoss(NamedTuple):
    """A loss on rows that nothing was trained on.

    Attributes:
        mean: negative log-likelihood over the trained tokens of all rows, in nats a token.
        tokens: how many those are.
        by_row: nats of each row, summed over its tokens, in the order of the rows.
        sizes: tokens of each row.
    """

    mean: float
    tokens: int
    by_row: list[float]
    sizes: list[int]

    def of(self, mine: Sequence[bool]) -> HeldOutLoss:
        """The same of some of the rows, at least one.

        Args:
            mine: whether a row is one of them.
        """
        by_row, sizes = list(compress(self.by_row, mine)), list(compress(self.sizes, mine))
        return HeldOutLoss(sum(by_row) / sum(sizes), sum(sizes), by_row, sizes)


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Encoded], pad_id: int, batch_size: int = 16) -> HeldOutLoss:
    """The loss of a model on `rows`.

    Rows are batched by length, so little padding is computed, and each rank computes its share of the batches; the mean
    is over tokens, whatever the batches.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ordered = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]

    def measured(places: list[int]) -> tuple[float, list[float], list[int]]:
        """Nats of a batch, of each row, and how many tokens those are."""
        batch = [rows[i] for i in places]
        tokens = pad([r.input_ids for r in batch], pad_id).to(device)
        mask = pad([[1] * len(r.input_ids) for r in batch], 0).bool().to(device)
        picked = (pad([r.labels for r in batch], IGNORED) != IGNORED).to(device)
        picked[:, 0] = False  # nothing stands before a first token
        logprobs, _, _ = picked_logprobs(model, tokens, mask, picked)
        counts = picked.sum(1).tolist()
        return -logprobs.sum().item(), [-of_row.sum().item() for of_row in logprobs.split(counts)], counts

    mine = [measured(places) for places in ranks.dealt(batches)]
    if is_sharded(model) and len(mine) * ranks.world() < len(batches):
        measured(batches[-1])  # to be thrown away: all ranks take a pass at once
    found = ranks.gathered(mine, len(batches))
    model.train(was_training)
    total, by_row, sizes = 0.0, [0.0] * len(rows), [0] * len(rows)
    for places, (nats, of_rows, counts) in zip(batches, found, strict=True):
        total += nats
        for i, nats_of_row, count in zip(places, of_rows, counts, strict=True):
            by_row[i], sizes[i] = nats_of_row, count
    return HeldOutLoss(total / sum(sizes), sum(sizes), by_row, sizes)


def change_of(before: HeldOutLoss, after: HeldOutLoss) -> Interval:
    """By how much a loss changed on the same rows, in nats a token."""
    return ratio([b - a for a, b in zip(before.by_row, after.by_row, strict=True)], before.sizes)
