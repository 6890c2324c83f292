"""TRL's trainers on several ranks: each rank computes its share of a step's micro-batches, and gradients are summed.

Every rank runs the loop of one process over all batches, but computes only its own share. The trainer does not know of
the other ranks, so that rows, steps, token counts, an epoch's short last step and checkpoints do not depend on the
number of ranks. The order of rows is a function of (seed, epoch): a run that was interrupted in any epoch resumes with
the next rows.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align import ranks
from align.data.chat.encode import IGNORE_INDEX
from align.models.sharded import gather_optimiser, gather_weights, is_sharded, load_unsharded_weights, shard_optimiser
from align.ranks import LAUNCHED
from align.rollout.engine import build_generator, derive_place_seed

POOL = 50
"""Maximum number of batches whose rows are sorted by length together; at most a quarter of all batches."""


def build_epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Return the row indices of one epoch in training order, each once, with rows of similar length in one batch to
    save padding.

    Rows are shuffled, sorted by length within pools, and cut into batches, which are shuffled again. The batch with the
    longest row comes first, so that what does not fit into memory shows at once. Rows that fill no batch come last, and
    are drawn before anything is sorted.

    Args:
        batch_size: rows of an optimiser step.
    """
    generator = build_generator(torch.device("cpu"), seed, "rows", epoch)
    length = torch.tensor(lengths)
    rows = torch.randperm(len(lengths), generator=generator)
    count = len(rows) // batch_size
    incomplete_batch = rows[count * batch_size :]
    rows = rows[: count * batch_size]
    pools = rows.split(batch_size * max(1, min(count // 4, POOL))) if count else ()
    batches = [batch for pool in pools for batch in pool[length[pool].argsort(stable=True)].split(batch_size)]
    batches = [batches[number] for number in torch.randperm(count, generator=generator).tolist()]
    if batches:
        longest = max(range(count), key=lambda number: int(length[batches[number]].max()))
        batches.insert(0, batches.pop(longest))
    return [row for batch in (*batches, incomplete_batch) for row in batch.tolist()]


class EpochSampler(Sampler[int]):
    """A sampler of row indices in the order of `build_epoch_order`, a function of seed and epoch. accelerate's data
    loader calls `set_epoch` before it reads them, also in a resumed run."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(build_epoch_order(self.lengths, self.batch_size, self.seed, self.epoch))

    def __len__(self) -> int:
        return len(self.lengths)


WORLD_SIZES = (*LAUNCHED, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables from which accelerate reads the number of processes."""


@contextmanager
def as_single_process() -> Iterator[None]:
    """Hide the environment variables of a multi-rank launch in the `with` block, so that a trainer built there assumes
    one process."""
    removed = {} if ranks.is_alone() else {n: os.environ.pop(n) for n in WORLD_SIZES if n in os.environ}
    try:
        yield
    finally:
        os.environ |= removed


class MultiRankTrainer(Trainer):
    """A mixin for TRL's trainers that splits the micro-batches of each step over the ranks.

    Rows are read in the order of `EpochSampler`. transformers' own sampler by length uses torch's global generator: a
    run that was resumed in its second epoch read the order of the first one again, some rows twice and others never.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    _metrics: Any  # of TRL's trainers: mode → figure → one number a micro-batch

    def __init__(self, *given: Any, args: Any, **more: Any) -> None:
        self.micro_batches = 0  # of this step so far
        self.results: list[tuple[Tensor, dict[str, list[float]]]] = []  # loss and figures of this rank's among them
        super().__init__(*given, args=args, **more)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradient and the loss of one micro-batch, or skip a micro-batch of another rank and return 0. On
        several ranks the last one of a step returns the sum of all, added in the order of one process, and logs its
        figures."""
        if ranks.is_alone():
            return super().training_step(model, inputs, num_items_in_batch)
        place = self.micro_batches
        is_last = self.accelerator.sync_gradients
        self.micro_batches += 1
        if place % ranks.world_size() == ranks.rank():
            # A function of the place: a run that is continued on several ranks draws the same dropout.
            torch.manual_seed(derive_place_seed(self.args.seed, "dropout", self.state.global_step, place))
            self.results.append(self.compute_share(model, inputs, num_items_in_batch))
        loss = torch.zeros((), device=self.args.device)
        if not is_last:
            return loss
        if not is_sharded(model):
            ranks.sum_gradients(p for p in model.parameters() if p.requires_grad)
        elif ranks.rank() >= self.micro_batches % ranks.world_size() > 0:
            # No micro-batch is left for this rank, and all ranks run a pass at once.
            ignored = torch.full_like(inputs["labels"], IGNORE_INDEX)
            self.compute_share(model, {**inputs, "labels": ignored}, num_items_in_batch)
        for share, figures in ranks.gather_shares(self.results, self.micro_batches):
            loss += share.to(loss.device)
            for name, values in figures.items():
                self._metrics["train"][name] += values
        self.micro_batches = 0
        self.results = []
        return loss

    def compute_share(
        self, model: nn.Module, inputs: dict[str, Any], items: Any
    ) -> tuple[Tensor, dict[str, list[float]]]:
        """Run the forward and backward pass of one micro-batch, and return its part of the loss and the metrics that
        TRL averages over micro-batches."""
        logged = self._metrics["train"]
        self._metrics["train"] = defaultdict(list)
        loss = super().training_step(model, inputs, items)
        figures = dict(self._metrics["train"])
        self._metrics["train"] = logged
        return loss.cpu(), figures

    # Checkpoints: the first rank writes them, as one process does. Each reads them.

    def _save_checkpoint(self, *given: Any, **more: Any) -> None:
        if ranks.is_main():
            super()._save_checkpoint(*given, **more)
        elif is_sharded(self.model):
            gather_weights(self.model)
            gather_optimiser(self.optimizer.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, gather_weights(self.model) if is_sharded(self.model) else state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model):
            torch.save(gather_optimiser(self.optimizer.state_dict()), Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if is_sharded(self.model):
            load_unsharded_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        moments, schedule = (
            torch.load(Path(checkpoint, name), map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(shard_optimiser(moments, parameters))
        self.lr_scheduler.load_state_dict(schedule)

    # Rows

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        # The tokens of a row's longest text if it holds several.
        lengths = rows["length"] if "length" in rows.column_names else map(len, rows["input_ids"])
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(list(lengths), step, self.args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL would put one beside the checkpoints, about a model that it cannot name."""


class TokenRowsTrainer(MultiRankTrainer):
    """A mixin for trainers whose rows need no tokenization, because they hold token ids or refer to tokenized rows."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset
