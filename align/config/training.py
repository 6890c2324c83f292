"""Settings that SFT, reward modelling, DPO, KTO and PPO share, such as learning rate and batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from align.config.rates import describe_defaults
from align.config.settings import Settings, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.groups import DataConfig
    from align.config.root import Config

OPTIMISERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor")
SCHEDULES = ("constant", "linear", "cosine")


def declare_lr(column: str) -> Any:
    """Return a field for the setting `lr` of a stage, which is `None` by default, with the default rates in its help
    text.

    Args:
        column: of the table in `align.config.rates`.
    """
    meaning = f"Learning rate at its highest. Empty: by the size of the base, {describe_defaults(column)}."
    return setting(None, meaning, above=0)


def declare_batch_size(rows: str) -> Any:
    """Return a field for the setting `batch_size`, by default 16, with the unit `rows` in its help text."""
    return setting(16, f"{rows} in one optimiser step.", above=0)


def declare_micro_batch(rows: str) -> Any:
    """Return a field for the setting `micro_batch`, the rows in one forward pass, by default 8."""
    return setting(8, f"{rows} that go through the model at once; memory grows with it.", above=0)


def declare_warmup(share: float, max_share: float | None = None) -> Any:
    """Return a field for the setting `warmup`, the share of the steps over which the learning rate rises."""
    meaning = "Share of the steps over which the learning rate rises."
    return setting(share, meaning, at_least=0, at_most=max_share, below=None if max_share else 1)


def declare_schedule(default: str) -> Any:
    return setting(default, "How the learning rate changes after the warmup.", choices=SCHEDULES)


def declare_max_grad_norm() -> Any:
    return setting(1.0, "Gradients with a larger norm are scaled down to this norm.", above=0)


def declare_weight_decay() -> Any:
    return setting(0.0, "AdamW's weight decay.", at_least=0)


def declare_save_every(default: int, steps: str = "Steps") -> Any:
    """Return a field for the setting `save_every`, the number of steps between two checkpoints."""
    return setting(default, f"{steps} between two checkpoints.", above=0)


def declare_gradient_checkpointing() -> Any:
    return setting(
        "auto",
        "Recompute activations in the backward pass: less memory, more time. `auto`: on cuda.",
        choices=("auto", "true", "false"),
    )


@dataclass
class TrainingConfig(Settings):
    """Settings that all stages of supervised training have."""

    AT: ClassVar[str] = "stage"

    name: str = ""
    lr: float | None = None
    epochs: float = setting(1.0, "Passes over the data.", above=0)
    batch_size: int = declare_batch_size("Rows")
    micro_batch: int = declare_micro_batch("Rows")
    gradient_accumulation: int | None = setting(
        None,
        "Micro-batches in one optimiser step. It sets batch_size to this number times micro_batch; give one of the "
        "two.",
        above=0,
    )
    warmup: float = declare_warmup(0.05)
    schedule: str = declare_schedule("cosine")
    optimiser: str = setting(
        "auto",
        "The optimiser. `auto`: paged_adamw_8bit on cuda, adamw otherwise. The 8-bit optimisers need cuda.",
        choices=("auto", *OPTIMISERS),
    )
    adam_beta1: float = setting(
        0.9, "Decay of the optimiser's mean of gradients. adafactor ignores it.", at_least=0, below=1
    )
    adam_beta2: float = setting(
        0.999, "Decay of the optimiser's mean of squared gradients. adafactor ignores it.", at_least=0, below=1
    )
    max_grad_norm: float = declare_max_grad_norm()
    eval_every: int | None = setting(
        None,
        "Steps between two measurements of the held-out loss during training. The last step is always measured. "
        "Empty: no measurements.",
        above=0,
    )
    publish: str = setting(
        "last",
        "Which weights are published. `last`: those of the last step. `best`: those of the step with the lowest "
        "held-out loss that eval_every measured.",
        choices=("last", "best"),
    )
    patience: int | None = setting(
        None,
        "Training ends after this number of measurements in a row without a lower held-out loss. Empty: never.",
        above=0,
    )
    log_every: int = setting(
        10, "Steps between two rows of metrics. The first and the last step always have a row.", above=0
    )
    save_every: int = declare_save_every(50)
    gradient_checkpointing: str = declare_gradient_checkpointing()

    def check_together(self) -> None:
        """Validate the settings, and replace `gradient_accumulation` by the `batch_size` that it implies, in place.

        So both spellings are the same run.

        Raises:
            InputError: the two contradict each other, a batch is not whole micro-batches, or `publish` or `patience`
                need measurements and `eval_every` is empty.
        """
        micro = self.micro_batch
        if self.gradient_accumulation is not None:
            if self.batch_size != type(self).batch_size:
                require_consistent_batch_size(self.batch_size, self.gradient_accumulation, micro)
            object.__setattr__(self, "batch_size", self.gradient_accumulation * micro)  # also if it is frozen
            object.__setattr__(self, "gradient_accumulation", None)
        batch = self.batch_size
        problem = f"is not a multiple of stage.micro_batch={micro}"
        remedy = "Make it one: gradients are accumulated over whole micro-batches."
        require(batch % micro == 0, "stage.batch_size", batch, problem, remedy)
        for key, unused in (("publish", "last"), ("patience", None)):
            value = getattr(self, key)
            problem = "needs measurements of the held-out loss during training"
            is_measured = value == unused or self.eval_every is not None
            require(is_measured, f"stage.{key}", value, problem, "Add stage.eval_every=STEPS.")


@dataclass
class PreferenceTrainingConfig(TrainingConfig):
    """Settings that all stages have that train an adapter on preference pairs."""

    ADAPTER_ONLY: ClassVar[str] = ""

    held_out: float = setting(
        0.1,
        "Share of the prompts that is held out: the model is measured on their pairs and never trained on them.",
        above=0,
        below=1,
    )

    def check(self, config: Config) -> None:
        require_preference_data(config.data, self.held_out == type(self).held_out)
        method = config.method.name
        require(method != "full", "method", method, self.ADAPTER_ONLY, "Use method=qlora or method=lora.")


def require_consistent_batch_size(batch: int, passes: int, micro: int) -> None:
    """Raise InputError unless `stage.batch_size` is `stage.gradient_accumulation` times `stage.micro_batch`."""
    problem = f"is not stage.gradient_accumulation={passes} times stage.micro_batch={micro}"
    require(batch == passes * micro, "stage.batch_size", batch, problem, "Give one of the two.")


def require_held_out_rows(eval_every: int | None, held_out: int, share_key: str) -> None:
    """Raise InputError if `stage.eval_every` asks for the held-out loss and there are no held-out rows.

    Args:
        held_out: number of held-out rows or pairs.
        share_key: the key that sets this number.
    """
    has_rows = eval_every is None or held_out > 0
    remedy = f"Raise {share_key}, name a file in data.eval_path, or drop it."
    require(has_rows, "stage.eval_every", eval_every, "nothing is held out to measure on", remedy)


def require_preference_data(data: DataConfig, is_default_share: bool) -> None:
    """Raise InputError if `data=` cannot hold preference pairs, or its settings contradict `stage.held_out`.

    Args:
        is_default_share: whether `stage.held_out` is at its default.
    """
    require(
        data.reasoning != "mask",
        "data.reasoning",
        data.reasoning,
        "applies to supervised training only: pairs are trained on whole answers",
        "Write keep or hide.",
    )
    require(
        data.eval_path is None or is_default_share,
        "data.eval_path",
        data.eval_path,
        "is measured on, and stage.held_out is given too",
        "Drop one of the two.",
    )
    require(
        data.name != "manifest" or is_default_share,
        "data",
        data.name,
        "is divided already, and stage.held_out is given too",
        "Drop stage.held_out, or make another data set: stage=data data.held_out=….",
    )
    require(
        data.name in ("annotations", "files", "manifest"),
        "data",
        data.name,
        "holds no preference pairs",
        "Use data=annotations with project=NAME, data=files with data.path=PAIRS.jsonl, or data=manifest.",
    )


def require_divisible_batch(stage: Any, world_size: int) -> None:
    """Raise InputError unless an optimiser step's batch can be divided evenly among the ranks, in whole micro-batches.

    Args:
        stage: the settings of a stage. One without optimiser steps fits any number of ranks.
        world_size: number of ranks.

    Raises:
        InputError: the batch cannot be divided evenly.
    """
    if world_size == 1 or stage.name not in ("sft", "full", "reward", "dpo", "kto", "ppo"):
        return
    rows = stage.batch_size // getattr(stage, "minibatches", 1)
    key = "stage.batch_size" if not hasattr(stage, "minibatches") else "stage.batch_size / stage.minibatches"
    problem = f"{key} = {rows} is not a multiple of the {world_size} ranks"
    require(
        rows % world_size == 0, "stage.batch_size", stage.batch_size, problem, "Use a multiple of it, or other devices."
    )
    size = min(stage.micro_batch, rows)
    share = rows // world_size
    largest_fitting = max(n for n in range(1, min(size, share) + 1) if share % n == 0)
    problem = f"{world_size} ranks of {size} rows each do not divide the {rows} rows of an optimiser step ({key})"
    remedy = f"Use stage.micro_batch={largest_fitting}, or other devices."
    require(largest_fitting == size, "stage.micro_batch", stage.micro_batch, problem, remedy)
