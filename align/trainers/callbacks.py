"""Callbacks of TRL's trainers: the held-out loss while training, and the stop at the first number that is not finite.

The held-out loss is measured every so many steps; the best weights are kept, and training ends if no lower loss comes.
The result lies in the Trainer's own state (`best_metric`, `best_global_step`), which every checkpoint holds. The best
weights are a checkpoint of their own, written at the step that was measured: there is no other copy of them, in memory
or on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.core.errors import InputError
from align.models.finite import check_tensors, diverged, where
from align.run.checkpoints import beside, sealed

STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Measuring:
    """When the held-out loss is measured, and what follows from it.

    Attributes:
        loss: the held-out loss of the model as it stands, given how many steps it has taken. It raises InputError where
            that is no number.
        every: steps between two measurements; the last step is measured too. None: nothing is measured.
        publish: `best` or `last`.
        patience: measurements in a row without a lower loss after which training ends; None: never.
    """

    loss: Callable[[int], float]
    every: int | None = None
    publish: str = "last"
    patience: int | None = None

    @classmethod
    def by(cls, loss: Callable[[int], float], settings: Any) -> Measuring:
        """With the rest from whatever has the settings `eval_every`, `publish` and `patience`."""
        return cls(loss, settings.eval_every, settings.publish, settings.patience)

    def published(self, state: TrainerState) -> int:
        """The step whose weights a run in this state would publish."""
        return state.best_global_step or state.global_step if self.publish == "best" else state.global_step

    def exhausted(self, state: TrainerState) -> bool:
        """Whether patience has run out."""
        if not (self.every and self.patience and state.best_global_step):
            return False
        return state.global_step // self.every - state.best_global_step // self.every >= self.patience

    def in_words(self, state: TrainerState, planned: int) -> str:
        """Which step is published and why training ended; empty where nothing was measured on the way.

        Args:
            planned: steps that training would have had.
        """
        if not self.every:
            return ""
        step, taken = self.published(state), state.global_step
        which = "the lowest held-out loss" if self.publish == "best" else "the last"
        said = f"step {step} is published, {which}"
        if taken < planned:
            said += (
                f"; training ended at step {taken} of {planned}, after {self.patience} measurements without a lower one"
            )
        return said

    def whole(self, checkpoint: Path) -> bool:
        """Whether a checkpoint can be continued from: it is sealed, and so is that of the weights it would publish."""
        if not sealed(checkpoint):
            return False
        best = beside(checkpoint, self.published(state_in(checkpoint)))
        return best == checkpoint or sealed(best)


class Evaluation(TrainerCallback):
    """Measures, and says in the Trainer's state which step was the best.

    Attributes:
        losses: step → held-out loss, of those that this process measured.
    """

    def __init__(self, measuring: Measuring) -> None:
        self.measuring = measuring
        self.losses: dict[int, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        step, given = state.global_step, self.measuring
        if not given.every or (step % given.every and step < state.max_steps):
            return
        # Training goes on as if nobody had asked: with the same draws, and in its own mode, by which TRL files figures.
        with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
            loss = self.losses[step] = given.loss(step)
        model.train()
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric, state.best_global_step = loss, step
            control.should_save |= given.publish == "best"
        elif given.exhausted(state):
            control.should_training_stop = control.should_save = True


def state_in(checkpoint: Path) -> TrainerState:
    """What the Trainer wrote down at a checkpoint that is sealed."""
    return TrainerState.load_from_json(str(checkpoint / STATE))


ANEW = "Remove it and run the same command again."


class NanGuard(TrainerCallback):
    """Stops where a loss or a gradient is not finite, before the step is taken; and does not start from a checkpoint
    that is not.

    Under `fp16` a scaled gradient may overflow: the scaler then takes no step and scales less. There the loss decides.

    Args:
        dtype: that the run computes in.
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: Any = None, optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if state.global_step:
            unpaged(optimizer)
            tensors = {**trained_in(model), **dict(optimiser_state(optimizer))}
            check_tensors(tensors.items(), "checkpoint", f"checkpoint-{state.global_step}", ANEW)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        gradients = [p.grad for p in trained_in(model).values() if p.grad is not None]
        if not args.fp16 and not math.isfinite(float(nn.utils.get_total_norm(gradients))):
            raise self.stop(state.global_step + 1, "the gradient is not finite", args, model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: Any = None, model: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if name in (logs or {}) and not math.isfinite(logs[name]):
                raise self.stop(state.global_step, f"{name} is {logs[name]}", args, model)

    def stop(self, step: int, what: str, args: TrainingArguments, model: nn.Module) -> InputError:
        problem = f"step {step}: {what}{where(trained_in(model))}: the run has diverged"
        return diverged(problem, args.learning_rate, self.dtype)


def unpaged(optimiser: Any) -> None:
    """Take the mark of pageable memory from moments that lie in a device's own. A checkpoint of bitsandbytes' paged
    optimisers carries the mark along, and what is read straight to the device keeps it: the library would ask CUDA to
    move pages that are none, and end the process."""
    for _, moment in optimiser_state(optimiser):
        if moment.device.type == "cuda" and getattr(moment, "is_paged", False):
            moment.is_paged = False  # pyright: ignore[reportAttributeAccessIssue]


def trained_in(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimiser_state(optimiser: Any) -> Iterator[tuple[str, Tensor]]:
    """What an optimiser keeps, by parameter and name."""
    inner: Optimizer = getattr(optimiser, "optimizer", optimiser)  # accelerate wraps it
    for index, kept in enumerate(inner.state.values()):
        for name, value in kept.items():
            if isinstance(value, torch.Tensor):
                yield f"the optimiser's {name} of parameter {index}", value
