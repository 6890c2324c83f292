"""`stage=reward`: a reward model from preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.config.root import one_of, positive
from align.config.settings import Settings
from align.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class RewardStageConfig(Settings):
    """Bradley–Terry on pairs; the LoRA starts from the SFT adapter, the head from zero.

    `prioritise` writes into the annotation store how unsure the trained model is of each of the project's items, for
    those to be judged first: with data=annotations, in a project whose `order` is `priority`.

    `batch_size` and `micro_batch` count rankings: one of K answers is K texts to read; a pair is a ranking of two.
    """

    name: str = "reward"
    lr: float = 1e-3
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch: int = 8
    warmup: float = 0.05
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    held_out: float = 0.1
    log_every: int = 10
    save_every: int = 50
    gradient_checkpointing: str = "auto"
    prioritise: bool = False

    def __post_init__(self) -> None:
        for key in ("lr", "epochs", "batch_size", "micro_batch", "max_grad_norm", "log_every", "save_every"):
            positive(f"stage.{key}", getattr(self, key))
        require(
            0 <= self.warmup < 1, "stage.warmup", self.warmup, "is no share of the steps", "Give 0 or more, below 1."
        )
        one_of("stage.schedule", self.schedule, ("constant", "linear", "cosine"))
        one_of("stage.gradient_checkpointing", self.gradient_checkpointing, ("auto", "true", "false"))
        require(
            0 < self.held_out < 1,
            "stage.held_out",
            self.held_out,
            "a reward model needs pairs it was not trained on",
            "Give a share above 0 and below 1.",
        )
        require(
            self.batch_size % self.micro_batch == 0,
            "stage.batch_size",
            self.batch_size,
            f"is not a multiple of stage.micro_batch={self.micro_batch}",
            "Make it one: gradients are accumulated over whole micro-batches.",
        )

    def check(self, config: Config) -> None:
        require(
            config.data.name in ("annotations", "jsonl"),
            "data",
            config.data.name,
            "holds no preference pairs",
            "Use data=annotations with project=NAME, or data=jsonl with data.path=PAIRS.jsonl.",
        )
        require(
            config.data.name == "annotations" or not self.prioritise,
            "stage.prioritise",
            self.prioritise,
            "the items of a file are nobody's to judge",
            "Use data=annotations with project=NAME.",
        )
        require(
            config.method.name != "full",
            "method",
            config.method.name,
            "a reward model is an adapter and a head here",
            "Use method=qlora or method=lora.",
        )
