"""Settings that stages of supervised training share, declared once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.config.rates import describe_defaults
from align.config.settings import setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.groups import DataConfig

OPTIMISERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")


def lr(column: str) -> Any:
    """Declare the learning rate of a stage, whose default `align.config.rates` has.

    Args:
        column: of the table of rates.
    """
    meaning = f"Learning rate at its highest. Empty: by the size of the base, {describe_defaults(column)}."
    return setting(None, meaning, above=0)


def epochs() -> Any:
    return setting(1.0, "Passes over the data.", above=0)


def batch_size(rows: str = "Rows") -> Any:
    return setting(16, f"{rows} in one optimiser step.", above=0)


def micro_batch(rows: str = "Rows") -> Any:
    return setting(8, f"{rows} that go through the model at once; memory grows with it.", above=0)


def gradient_accumulation() -> Any:
    return setting(
        None,
        "Micro-batches in one optimiser step. It sets batch_size to this number times micro_batch; give one of the "
        "two.", above=0,
    )  # fmt: skip


def optimiser() -> Any:
    return setting(
        "auto",
        "The optimiser. `auto`: paged_adamw_8bit on cuda, adamw otherwise. The 8-bit optimisers need cuda.",
        choices=("auto", *OPTIMISERS),
    )  # fmt: skip


def adam_beta1() -> Any:
    return setting(0.9, "Decay of the optimiser's mean of gradients. adafactor ignores it.", at_least=0, below=1)


def adam_beta2() -> Any:
    return setting(
        0.999, "Decay of the optimiser's mean of squared gradients. adafactor ignores it.", at_least=0, below=1
    )


def warmup(share: float, most: float | None = None) -> Any:
    meaning = "Share of the steps over which the learning rate rises."
    return setting(share, meaning, at_least=0, at_most=most, below=None if most else 1)


def schedule(default: str = "cosine") -> Any:
    return setting(default, "How the learning rate changes after the warmup.", choices=SCHEDULES)


def max_grad_norm() -> Any:
    return setting(1.0, "Gradients with a larger norm are scaled down to this norm.", above=0)


def weight_decay() -> Any:
    return setting(0.0, "AdamW's weight decay.", at_least=0)


def log_every() -> Any:
    return setting(10, "Steps between two rows of metrics. The first and the last step always have a row.", above=0)


def save_every(default: int, steps: str = "Steps") -> Any:
    return setting(default, f"{steps} between two checkpoints.", above=0)


def eval_every() -> Any:
    return setting(
        None,
        "Steps between two measurements of the held-out loss during training. The last step is always measured. "
        "Empty: no measurements.", above=0,
    )  # fmt: skip


def publish() -> Any:
    return setting(
        "last",
        "Which weights are published. `last`: those of the last step. `best`: those of the step with the lowest "
        "held-out loss that eval_every measured.", choices=("last", "best"),
    )  # fmt: skip


def patience() -> Any:
    return setting(
        None,
        "Training ends after this number of measurements in a row without a lower held-out loss. Empty: never.",
        above=0,
    )


def held_out() -> Any:
    return setting(
        0.1,
        "Share of the prompts that is held out: the model is measured on their pairs and never trained on them.",
        above=0,
        below=1,
    )


def gradient_checkpointing() -> Any:
    return setting(
        "auto", "Recompute activations in the backward pass: less memory, more time. `auto`: on cuda.",
        choices=("auto", "true", "false"),
    )  # fmt: skip


def settled_batch(settings: Any) -> None:
    """Turn `gradient_accumulation` into the `batch_size` that it stands for, so that both ways to say it are one run.

    Raises:
        InputError: a batch size besides its default is given and contradicts it, or a batch is no whole number of
            micro-batches.
    """
    passes = settings.gradient_accumulation
    micro = settings.micro_batch
    if passes is not None:
        if settings.batch_size != type(settings).batch_size:
            one_batch(settings.batch_size, passes, micro)
        object.__setattr__(settings, "batch_size", passes * micro)  # also of a frozen instance
        object.__setattr__(settings, "gradient_accumulation", None)
    batch = settings.batch_size
    remedy = "Make it one: gradients are accumulated over whole micro-batches."
    require(batch % micro == 0, "stage.batch_size", batch, f"is not a multiple of stage.micro_batch={micro}", remedy)


def one_batch(batch: int, passes: int, micro: int) -> None:
    """Raises InputError unless a batch is so many passes of a micro-batch."""
    require(
        batch == passes * micro, "stage.batch_size", batch,
        f"is not stage.gradient_accumulation={passes} times stage.micro_batch={micro}", "Give one of the two.",
    )  # fmt: skip


def measured_on_the_way(eval_every: int | None, publish: str, patience: int | None) -> None:
    """Raises InputError where something is to follow from measurements that nobody asked for."""
    needs = {"stage.publish": publish if publish == "best" else None, "stage.patience": patience}
    for key, value in needs.items():
        require(
            value is None or eval_every is not None, key, value, "goes by the held-out loss while it trains",
            "Add stage.eval_every=STEPS.",
        )  # fmt: skip


def held_out_for(eval_every: int | None, held_out: int, share: str) -> None:
    """Raises InputError where the held-out loss is to be measured and nothing is held out.

    Args:
        held_out: how many rows or pairs there are to measure on.
        share: the key that says how many.
    """
    require(
        eval_every is None or held_out > 0, "stage.eval_every", eval_every, "nothing is held out to measure on",
        f"Raise {share}, name a file in data.eval_path, or drop it.",
    )  # fmt: skip


def of_pairs(data: DataConfig, usual_share: bool) -> None:
    """Raises InputError unless a data set is one of preference pairs.

    Args:
        usual_share: `stage.held_out` is at its default.
    """
    require(
        data.reasoning != "mask", "data.reasoning", data.reasoning,
        "is of supervised training: a pair is judged by all of it", "Write keep or hide.",
    )  # fmt: skip
    require(
        data.eval_path is None or usual_share, "data.eval_path", data.eval_path,
        "is measured on, and stage.held_out is given too", "Drop one of the two.",
    )  # fmt: skip
    require(
        data.name != "manifest" or usual_share, "data", data.name,
        "is divided already, and stage.held_out is given too",
        "Drop stage.held_out, or make another data set: stage=data data.held_out=….",
    )  # fmt: skip
    require(
        data.name in ("annotations", "files", "manifest"), "data", data.name, "holds no preference pairs",
        "Use data=annotations with project=NAME, data=files with data.path=PAIRS.jsonl, or data=manifest.",
    )  # fmt: skip


def check_ranks(stage: Any, world: int) -> None:
    """Each rank has as many micro-batches of an optimiser step as the others.

    Args:
        stage: the settings of a stage; one that takes no optimiser steps fits on any.
        world: how many ranks there are.

    Raises:
        InputError: they cannot be divided so.
    """
    if world == 1 or stage.name not in ("sft", "full", "reward", "dpo", "kto", "ppo"):
        return
    rows = stage.batch_size // getattr(stage, "minibatches", 1)
    which = "stage.batch_size" if not hasattr(stage, "minibatches") else "stage.batch_size / stage.minibatches"
    require(
        rows % world == 0, "stage.batch_size", stage.batch_size,
        f"{which} = {rows} is not a multiple of the {world} ranks", "Use a multiple of it, or other devices.",
    )  # fmt: skip
    size = min(stage.micro_batch, rows)
    share = rows // world
    fitting = max(n for n in range(1, min(size, share) + 1) if share % n == 0)
    require(
        fitting == size, "stage.micro_batch", stage.micro_batch,
        f"{world} ranks of {size} rows each do not divide the {rows} rows of an optimiser step ({which})",
        f"Use stage.micro_batch={fitting}, or other devices.",
    )  # fmt: skip
