"""`stage=dpo`: preference pairs straight into an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.config.root import one_of, positive
from align.config.settings import Settings
from align.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class DpoConfig(Settings):
    """Direct preference optimisation (Rafailov et al., 2023): the policy's own logprobs, against those it started with,
    are the reward, and Bradley–Terry on them is the loss. `beta` is the price of leaving the start, as `kl_coef` is in
    PPO. `loss` is `sigmoid` or `ipo` (Azar et al., 2023), which does not push pairs apart without end.
    """

    name: str = "dpo"
    beta: float = 0.1
    loss: str = "sigmoid"
    lr: float = 1e-4
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

    def __post_init__(self) -> None:
        for key in ("beta", "lr", "epochs", "batch_size", "micro_batch", "max_grad_norm", "log_every", "save_every"):
            positive(f"stage.{key}", getattr(self, key))
        require(
            0 <= self.warmup < 1, "stage.warmup", self.warmup, "is no share of the steps", "Give 0 or more, below 1."
        )
        one_of("stage.loss", self.loss, ("sigmoid", "ipo"))
        one_of("stage.schedule", self.schedule, ("constant", "linear", "cosine"))
        one_of("stage.gradient_checkpointing", self.gradient_checkpointing, ("auto", "true", "false"))
        require(
            0 < self.held_out < 1, "stage.held_out", self.held_out, "leaves no pairs on one side",
            "Give a share above 0 and below 1.",
        )  # fmt: skip
        require(
            self.batch_size % self.micro_batch == 0, "stage.batch_size", self.batch_size,
            f"is not a multiple of stage.micro_batch={self.micro_batch}",
            "Make it one: gradients are accumulated over whole micro-batches.",
        )  # fmt: skip

    def check(self, config: Config) -> None:
        require(
            config.data.name in ("annotations", "jsonl"), "data", config.data.name, "holds no preference pairs",
            "Use data=annotations with project=NAME, or data=jsonl with data.path=PAIRS.jsonl.",
        )  # fmt: skip
        require(
            config.method.name != "full", "method", config.method.name, "DPO trains an adapter here",
            "Use method=qlora or method=lora.",
        )  # fmt: skip
