"""TRL's trainers on several ranks: an optimiser step's micro-batches are dealt to them, and their gradients are summed.

Every rank runs the loop of one process over the same batches, and computes those that are its own. A trainer is told
that it is alone, so that rows, steps, token counts, an epoch's short last step and checkpoints are those of one
process, whatever the number of ranks.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from align import ranks
from align.data.chat.encode import IGNORED
from align.models.sharded import is_sharded, optimiser_in_shards, optimiser_whole, read_weights, weights
from align.ranks import LAUNCHED
from align.rollout.randomness import place_seed
from align.trainers.row_order import InEpochOrder

TOLD = (*LAUNCHED, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What accelerate counts processes by."""


@contextmanager
def counted_as_one() -> Iterator[None]:
    """A trainer that is built inside takes this process for the only one."""
    held = {} if ranks.alone() else {name: os.environ.pop(name) for name in TOLD if name in os.environ}
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


class Dealt(InEpochOrder):
    """What each trainer here is mixed with."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    _metrics: Any  # of TRL's trainers: mode → figure → one number a micro-batch

    def __init__(self, *given: Any, args: Any, **more: Any) -> None:
        self.seen, self.shares = 0, list[Share]()  # micro-batches of this step; of them this rank's
        super().__init__(*given, args=args, **more)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The gradient and the loss of one micro-batch. On several ranks the last one of a step brings both for all."""
        if ranks.alone():
            return super().training_step(model, inputs, num_items_in_batch)
        place, last = self.seen, self.accelerator.sync_gradients
        self.seen += 1
        mine = place % ranks.world() == ranks.rank()
        if mine:
            # A function of the place: a run that is continued on several ranks draws the same dropout.
            torch.manual_seed(place_seed(self.args.seed, "dropout", self.state.global_step, place))
            self.shares.append(self.share(model, inputs, num_items_in_batch))
        if not last:
            return torch.zeros((), device=self.args.device)
        if not is_sharded(model):
            ranks.sum_gradients(p for p in model.parameters() if p.requires_grad)
        elif ranks.rank() >= self.seen % ranks.world() > 0:  # none is left for this rank, and all take a pass at once
            nothing = torch.full_like(inputs["labels"], IGNORED)
            self.share(model, {**inputs, "labels": nothing}, num_items_in_batch)
        found, self.seen, self.shares = ranks.gathered(self.shares, self.seen), 0, []
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
