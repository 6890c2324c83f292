"""Settings that stages of supervised training share, declared once."""

from __future__ import annotations

from typing import Any

from align.config.settings import setting
from align.errors import require

SCHEDULES = ("constant", "linear", "cosine")


def epochs() -> Any:
    return setting(1.0, "Passes over the data.", above=0)


def batch_size(rows: str = "Rows") -> Any:
    return setting(16, f"{rows} that a step of the optimiser sees.", above=0)


def micro_batch(rows: str = "Rows") -> Any:
    return setting(8, f"{rows} that go through the model at once; memory grows with it.", above=0)


def warmup(share: float, most: float | None = None) -> Any:
    meaning = "Share of the steps over which the learning rate rises."
    return setting(share, meaning, at_least=0, at_most=most, below=None if most else 1)


def schedule(default: str = "cosine") -> Any:
    return setting(default, "Course of the learning rate after the warmup.", choices=SCHEDULES)


def max_grad_norm() -> Any:
    return setting(1.0, "Gradients of a larger norm are scaled down to it.", above=0)


def weight_decay() -> Any:
    return setting(0.0, "Decay of the weights by AdamW.", at_least=0)


def log_every() -> Any:
    return setting(10, "Steps between two rows of metrics.", above=0)


def save_every(default: int, steps: str = "Steps") -> Any:
    return setting(default, f"{steps} between two checkpoints.", above=0)


def held_out() -> Any:
    return setting(
        0.1, "Share of the prompts whose pairs the model is measured on and never trained on.", above=0, below=1
    )


def gradient_checkpointing() -> Any:
    return setting(
        "auto", "Recompute activations in the backward pass: less memory, more time. `auto`: on cuda.",
        choices=("auto", "true", "false"),
    )  # fmt: skip


def whole_micro_batches(batch: int, micro: int) -> None:
    """Raises InputError unless a batch is a whole number of micro-batches."""
    require(
        batch % micro == 0, "stage.batch_size", batch, f"is not a multiple of stage.micro_batch={micro}",
        "Make it one: gradients are accumulated over whole micro-batches.",
    )  # fmt: skip


def of_pairs(data: str, reasoning: str) -> None:
    """Raises InputError unless a data set is one of preference pairs."""
    require(
        reasoning != "mask", "data.reasoning", reasoning, "is of supervised training: a pair is judged by all of it",
        "Write keep or hide.",
    )  # fmt: skip
    require(
        data in ("annotations", "jsonl"), "data", data, "holds no preference pairs",
        "Use data=annotations with project=NAME, or data=jsonl with data.path=PAIRS.jsonl.",
    )  # fmt: skip
