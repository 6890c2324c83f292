"""The held-out loss while training: measured every so many steps, the best weights kept, training ended where it stays
away.

What was found lies in the Trainer's own state (`best_metric`, `best_global_step`), which every checkpoint holds. The
best weights are a checkpoint of their own, written at the step that was measured: there is no other copy of them, in
memory or on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
