"""Training ends at the first step that comes to numbers that are none, and says where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.core.errors import InputError
from align.models.finite import check_tensors, diverged, where

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
