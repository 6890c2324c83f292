"""TRL's trainers on several ranks: an optimiser step's micro-batches are dealt to them, and their gradients are summed.

Every rank runs the loop of one process over the same batches, and computes those that are its own. A trainer believes
that it is alone, so that rows, steps, token counts, an epoch's short last step and checkpoints are those of one
process, whatever the number of ranks. The order of rows is a function of (seed, epoch): a run that was cut short in any
epoch goes on with the rows that were next.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align import ranks
from align.data.chat.encode import IGNORED
from align.models.sharded import is_sharded, optimiser_in_shards, optimiser_whole, read_weights, weights
from align.ranks import LAUNCHED
from align.rollout.engine import generator_for, place_seed

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


TOLD = (*LAUNCHED, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What accelerate counts processes by."""


@contextmanager
def counted_as_one() -> Iterator[None]:
    """A trainer that is built inside takes this process for the only one."""
    held = {} if ranks.is_alone() else {name: os.environ.pop(name) for name in TOLD if name in os.environ}
    try:
        yield
    finally:
        os.environ |= held


class Share(NamedTuple):
    """What a rank found for one micro-batch.

    Attributes:
        loss: its part of the step's.
        figures: that TRL averages over micro-batches.
    """

    loss: Tensor
    figures: dict[str, list[float]]


class Dealt(Trainer):
    """The mixin of every trainer here.

    Rows are read in the order of `EpochSampler`. transformers' own sampler by length draws from torch's global
    generator: a run that was continued in its second epoch read the first one's order again, some rows twice and others
    never.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    _metrics: Any  # of TRL's trainers: mode → figure → one number a micro-batch

    def __init__(self, *given: Any, args: Any, **more: Any) -> None:
        self.seen, self.shares = 0, list[Share]()  # micro-batches of this step; of them this rank's
        super().__init__(*given, args=args, **more)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The gradient and the loss of one micro-batch. On several ranks the last one of a step brings both for all."""
        if ranks.is_alone():
            return super().training_step(model, inputs, num_items_in_batch)
        place, last = self.seen, self.accelerator.sync_gradients
        self.seen += 1
        mine = place % ranks.world_size() == ranks.rank()
        if mine:
            # A function of the place: a run that is continued on several ranks draws the same dropout.
            torch.manual_seed(place_seed(self.args.seed, "dropout", self.state.global_step, place))
            self.shares.append(self.share(model, inputs, num_items_in_batch))
        if not last:
            return torch.zeros((), device=self.args.device)
        if not is_sharded(model):
            ranks.sum_gradients(p for p in model.parameters() if p.requires_grad)
        elif (
            ranks.rank() >= self.seen % ranks.world_size() > 0
        ):  # none is left for this rank, and all take a pass at once
            nothing = torch.full_like(inputs["labels"], IGNORED)
            self.share(model, {**inputs, "labels": nothing}, num_items_in_batch)
        found, self.seen, self.shares = ranks.gather_shares(self.shares, self.seen), 0, []
        return self.of_step(found)

    def share(self, model: nn.Module, inputs: dict[str, Any], items: Any) -> Share:
        kept, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        loss = super().training_step(model, inputs, items)
        found, self._metrics["train"] = self._metrics["train"], kept
        return Share(loss.cpu(), dict(found))

    def of_step(self, shares: Sequence[Share]) -> Tensor:
        """The loss of all micro-batches, added in the order of one process, which would log these figures."""
        loss = torch.zeros((), device=self.args.device)
        for share in shares:
            loss += share.loss.to(loss.device)
            for name, values in share.figures.items():
                self._metrics["train"][name] += values
        return loss

    # Checkpoints: the first rank writes them, as one process does. Each reads them.

    def _save_checkpoint(self, *given: Any, **more: Any) -> None:
        if ranks.is_main():
            super()._save_checkpoint(*given, **more)
        elif is_sharded(self.model):
            weights(self.model)
            optimiser_whole(self.optimizer.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if is_sharded(self.model):
            state_dict = weights(self.model)
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            torch.save(optimiser_whole(self.optimizer.state_dict()), Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            read_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        kept, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(optimiser_in_shards(kept, parameters))
        self.lr_scheduler.load_state_dict(schedule)

    # Rows

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(self.row_lengths(rows), step, self.args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL writes one beside the checkpoints, of a model that it cannot name. They are the run's own."""

    def row_lengths(self, rows: Any) -> list[int]:
        """How many tokens each row has; that of its longest text where it holds several."""
        return list(rows["length"]) if "length" in rows.column_names else [len(ids) for ids in rows["input_ids"]]


class DealtTokenRows(Dealt):
    """The mixin of trainers whose rows are tokens already, or name such rows."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset
