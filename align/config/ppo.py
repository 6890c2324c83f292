"""`stage=ppo`: proximal policy optimisation on an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.config.root import one_of, positive
from align.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class PpoConfig:
    """PPO as in Ziegler et al. (2019) and Huang et al. (2024): KL to the reference as a per-token cost, the score at
    the last response token, GAE, clipped policy and value losses.

    `score_scale` multiplies the standardised score (mean 0, variance 1 over reference samples); with `kl_coef` it sets
    the exchange rate between reward and drift.
    """

    name: str = "ppo"
    updates: int = 60
    batch_size: int = 64
    epochs: int = 2
    minibatches: int = 2
    micro_batch: int = 32
    lr: float = 5e-4
    value_lr: float = 1e-3
    warmup: float = 0.05
    clip_range: float = 0.2
    value_clip_range: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    kl_control: str = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10_000.0
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    score_scale: float = 0.4
    missing_eos_penalty: float = 0.3
    whiten_rewards: bool = False
    bootstrap_truncated: bool = False
    normalise_on: int = 256
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for key in (
            "updates", "batch_size", "epochs", "minibatches", "micro_batch", "lr", "value_lr", "clip_range",
            "gamma", "kl_target", "kl_horizon", "score_scale", "normalise_on", "max_grad_norm",
        ):  # fmt: skip
            positive(f"stage.{key}", getattr(self, key))
        for key in ("lam", "gamma", "warmup"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"stage.{key}", value, "lies outside 0 to 1", "Give a number from 0 to 1.")
        for key in ("kl_coef", "missing_eos_penalty", "weight_decay"):
            value = getattr(self, key)
            require(value >= 0, f"stage.{key}", value, "is negative", "Give 0 or more.")
        one_of("stage.kl_control", self.kl_control, ("fixed", "adaptive"))
        one_of("stage.kl_estimator", self.kl_estimator, ("k1", "k3"))
        one_of("stage.kl_in", self.kl_in, ("reward", "loss"))
        require(
            self.kl_in != "loss" or self.kl_estimator == "k3",
            "stage.kl_estimator",
            self.kl_estimator,
            "has a gradient of expectation zero, so in the loss it would hold nothing back",
            "Add stage.kl_estimator=k3.",
        )
        if self.value_clip_range is not None:
            positive("stage.value_clip_range", self.value_clip_range)
        require(
            self.batch_size % self.minibatches == 0,
            "stage.batch_size",
            self.batch_size,
            f"is not a multiple of stage.minibatches={self.minibatches}",
            "Make it one, so that every minibatch has the same size.",
        )
        minibatch = self.batch_size // self.minibatches
        require(
            minibatch % min(self.micro_batch, minibatch) == 0,
            "stage.micro_batch",
            self.micro_batch,
            f"does not divide the minibatch of {minibatch}",
            "Choose a divisor.",
        )

    def check(self, config: Config) -> None:
        require(
            config.method.name != "full",
            "method",
            config.method.name,
            "PPO trains adapters here",
            "Use method=qlora or method=lora.",
        )
