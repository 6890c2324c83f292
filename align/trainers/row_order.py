"""The order in which TRL's trainers read rows: a function of (seed, epoch). A run that was cut short in any epoch goes
on with the rows that were next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from align.rollout.randomness import generator_for

POOL = 50
"""Batches whose rows are sorted by length together, at the most; a quarter of all batches where there are fewer."""


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Every row once, rows of like length next to each other, so that little padding is computed.

    Rows are shuffled, sorted by length within pools, and cut into batches, which are shuffled again. The batch with the
    longest row comes first, so that what does not fit into memory shows at once. Rows that fill no batch come last, and
    are drawn before anything is sorted.

    Args:
        batch_size: rows of an optimiser step.
    """
    generator = generator_for(torch.device("cpu"), seed, "rows", epoch)
    rows, length = torch.randperm(len(lengths), generator=generator), torch.tensor(lengths)
    whole = len(rows) // batch_size
    rows, rest = rows[: whole * batch_size], rows[whole * batch_size :]
    pools = rows.split(batch_size * max(1, min(whole // 4, POOL))) if whole else ()
    batches = [batch for pool in pools for batch in pool[length[pool].argsort(stable=True)].split(batch_size)]
    shuffled = [batches[number] for number in torch.randperm(whole, generator=generator).tolist()]
    first = max(range(whole), key=lambda number: int(length[shuffled[number]].max()), default=0)
    ordered = (*shuffled[first : first + 1], *shuffled[:first], *shuffled[first + 1 :], rest)
    return [row for batch in ordered for row in batch.tolist()]


class EpochSampler(Sampler[int]):
    """The rows of one epoch after another. accelerate's data loader tells which (`set_epoch`) before it asks for them,
    in a run that is continued too."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.batch_size, self.seed, self.epoch))

    def __len__(self) -> int:
        return len(self.lengths)


class InEpochOrder(Trainer):
    """What each trainer here is mixed with.

    transformers' own sampler by length draws from torch's global generator. A run that was continued in its second
    epoch read the first one's order again: some rows twice, others never.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(self.row_lengths(rows), step, self.args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL writes one beside the checkpoints, of a model that it cannot name. They are the run's own."""

    def row_lengths(self, rows: Any) -> list[int]:
        """How many tokens each row has; that of its longest text where it holds several."""
        return list(rows["length"]) if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]
