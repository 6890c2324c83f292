"""`stage=sft` and `stage=full`: supervised instruction tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from align.config.root import MOST, one_of, positive
from align.config.settings import Settings
from align.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class SftConfig(Settings):
    """One pass over the conversations unless told otherwise; `lr` follows the method (LoRA wants about ten times the
    learning rate of full fine-tuning)."""

    name: str = "sft"
    lr: float = II("method.lr")
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch: int = 8
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    packing: bool = False
    eval_size: int = 256
    log_every: int = 10
    save_every: int = 100
    gradient_checkpointing: str = "auto"

    def __post_init__(self) -> None:
        one_of("stage.name", self.name, ("sft", "full"))
        require(
            0 < self.lr <= MOST, "stage.lr", self.lr, "must be above zero and finite; it follows method.lr",
            "Give a positive number for either.",
        )  # fmt: skip
        for key in (
            "epochs",
            "batch_size",
            "micro_batch",
            "max_grad_norm",
            "eval_size",
            "log_every",
            "save_every",
        ):
            positive(f"stage.{key}", getattr(self, key))
        if self.max_steps is not None:
            positive("stage.max_steps", self.max_steps)
        require(self.weight_decay >= 0, "stage.weight_decay", self.weight_decay, "is negative", "Give 0 or more.")
        require(
            0 <= self.warmup < 1, "stage.warmup", self.warmup, "is no share of the steps", "Give 0 or more, below 1."
        )
        one_of("stage.schedule", self.schedule, ("constant", "linear", "cosine"))
        one_of("stage.gradient_checkpointing", self.gradient_checkpointing, ("auto", "true", "false"))
        require(
            self.batch_size % self.micro_batch == 0,
            "stage.batch_size",
            self.batch_size,
            f"is not a multiple of stage.micro_batch={self.micro_batch}",
            "Make it one: gradients are accumulated over whole micro-batches.",
        )

    def check(self, config: Config) -> None:
        full = config.method.name == "full"
        require(
            self.name != "full" or full,
            "method",
            config.method.name,
            "stage=full trains every weight",
            "Drop method=, or use stage=sft for adapters.",
        )
        require(
            self.name != "sft" or not full,
            "method",
            config.method.name,
            "stage=sft trains an adapter",
            "Use stage=full, which is the same stage with every weight trained.",
        )
        require(
            config.init == type(config).init,
            "init",
            config.init,
            f"stage={self.name} starts from a base model",
            "Name the base: model=hub model.path=DIR (a merged export is one).",
        )
        require(
            config.data.name != "annotations",
            "data",
            config.data.name,
            "holds preference pairs, not conversations to imitate",
            "Use data=chitchat or data=jsonl.",
        )
