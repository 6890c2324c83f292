"""`stage=ppo`: proximal policy optimisation on an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from align.config.root import one_of, positive
from align.config.settings import Settings
from align.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


ADAPTER_LR = 5e-4


@dataclass
class TripwireConfig(Settings):
    """Signs of over-optimisation, looked for at every update; empty: not looked for.

    `length_correlation`, `disagreement` (standard deviation of an ensemble's members), `kl` (nats a response) and
    `repetition` (share of repeated 3-grams) are crossed from below, `entropy` (nats a token) from above. A wire that is
    crossed for `patience` updates in a row makes a warning; with `action=stop` it ends the run and puts the `suspects`
    most suspicious answers into the annotation store, for a person to judge.
    """

    length_correlation: float | None = 0.8
    disagreement: float | None = None
    kl: float | None = 15.0
    entropy: float | None = 0.3
    repetition: float | None = 0.3
    patience: int = 3
    action: str = "warn"
    suspects: int = 16

    def __post_init__(self) -> None:
        one_of("stage.tripwires.action", self.action, ("warn", "stop"))
        positive("stage.tripwires.patience", self.patience)
        positive("stage.tripwires.suspects", self.suspects)

    def limits(self) -> dict[str, float | None]:
        """Each wire's threshold."""
        names = ("length_correlation", "disagreement", "kl", "entropy", "repetition")
        return {name: getattr(self, name) for name in names}


@dataclass
class FirstRatioConfig(Settings):
    """How far π_new/π_old may lie from 1 before the first step, by the dtype that is computed in: the mean over tokens
    of |log π_new − log π_old|, nats.

    The two are one policy's, read in batches of different shapes, so that rounding alone stands between them. More of
    it says that padding or positions change the model's logits."""

    float32: float = 1e-3
    bfloat16: float = 0.05

    def __post_init__(self) -> None:
        for key in ("float32", "bfloat16"):
            positive(f"stage.first_ratio.{key}", getattr(self, key))


@dataclass
class PpoConfig(Settings):
    """PPO as in Ziegler et al. (2019) and Huang et al. (2024): KL to the reference as a per-token cost, the score at
    the last response token, GAE, clipped policy and value losses.

    `score_scale` multiplies the standardised score (mean 0, variance 1 over reference samples); with `kl_coef` it sets
    the exchange rate between reward and drift. `normalise=running` goes on measuring mean and variance, `off` takes the
    scores as they are. `value_backbone` says what the value head reads: an adapter of its own, which starts from the
    reward model's; the policy's states, which saves a pass; or the reward model's, frozen. With `eval_every` the policy
    is measured on prompts kept out of training, and the best one so far is what the run publishes. `lr` is empty for
    5e-4 on an adapter and a tenth of it where every weight trains ("LoRA Without Regret", 2025).
    """

    name: str = "ppo"
    updates: int = 60
    batch_size: int = 64
    epochs: int = 2
    minibatches: int = 2
    micro_batch: int = 32
    lr: float | None = None
    value_backbone: str = "own"
    value_lr: float = 1e-3
    warmup: float = 0.05
    schedule: str = "constant"
    clip_range: float = 0.2
    value_clip_range: float | None = None
    max_approx_kl: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.05
    kl_control: str = "fixed"
    kl_target: float = 6.0
    kl_horizon: float = 10_000.0
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    score_scale: float = 0.4
    score_clip: float | None = None
    missing_eos_penalty: float = 0.3
    whiten_rewards: bool = False
    bootstrap_truncated: bool = False
    normalise: str = "once"
    normalise_on: int = 256
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    gradient_checkpointing: str = "auto"
    eval_every: int | None = None
    eval_prompts: int = 64
    shown: int = 4
    publish: str = "best"
    save_every: int = 10
    checkpoints: int = 2
    first_ratio: FirstRatioConfig = field(default_factory=FirstRatioConfig)
    tripwires: TripwireConfig = field(default_factory=TripwireConfig)

    def __post_init__(self) -> None:
        for key in (
            "updates", "batch_size", "epochs", "minibatches", "micro_batch", "value_lr", "clip_range",
            "gamma", "kl_target", "kl_horizon", "score_scale", "normalise_on", "max_grad_norm", "eval_prompts", "shown",
            "save_every", "checkpoints",
        ):  # fmt: skip
            positive(f"stage.{key}", getattr(self, key))
        for key in ("lr", "value_clip_range", "max_approx_kl", "score_clip", "eval_every"):
            if (value := getattr(self, key)) is not None:
                positive(f"stage.{key}", value)
        for key in ("lam", "gamma", "warmup"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"stage.{key}", value, "lies outside 0 to 1", "Give a number from 0 to 1.")
        for key in ("kl_coef", "missing_eos_penalty", "weight_decay"):
            value = getattr(self, key)
            require(value >= 0, f"stage.{key}", value, "is negative", "Give 0 or more.")
        for key, choices in (
            ("value_backbone", ("own", "policy", "frozen")),
            ("schedule", ("constant", "linear", "cosine")),
            ("kl_control", ("fixed", "adaptive")),
            ("kl_estimator", ("k1", "k3")),
            ("kl_in", ("reward", "loss")),
            ("normalise", ("once", "running", "off")),
            ("publish", ("best", "last")),
            ("gradient_checkpointing", ("auto", "true", "false")),
        ):
            one_of(f"stage.{key}", getattr(self, key), choices)
        require(
            self.kl_in != "loss" or self.kl_estimator == "k3",
            "stage.kl_estimator",
            self.kl_estimator,
            "has a gradient of expectation zero, so in the loss it would hold nothing back",
            "Add stage.kl_estimator=k3.",
        )
        if self.kl_control == "adaptive":
            require(
                self.kl_horizon >= self.batch_size, "stage.kl_horizon", self.kl_horizon,
                f"is less than stage.batch_size={self.batch_size}: one update could turn the price of KL around",
                "Raise it; Ziegler et al. have 10000.",
            )  # fmt: skip
            require(
                self.kl_coef > 0, "stage.kl_coef", self.kl_coef, "cannot be adapted: it would stay 0",
                "Start from a price above 0, or use stage.kl_control=fixed.",
            )  # fmt: skip
        require(
            self.shown <= self.eval_prompts, "stage.shown", self.shown,
            f"is more than stage.eval_prompts={self.eval_prompts}", "Show fewer.",
        )  # fmt: skip
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

    def filled(self, config: Config) -> PpoConfig:
        """With a learning rate, which depends on what trains."""
        lr = ADAPTER_LR / 10 if config.method.name == "full" else ADAPTER_LR
        return self if self.lr is not None else replace(self, lr=lr)

    def check(self, config: Config) -> None:
        require(
            config.dtype != "float16", "dtype", config.dtype, "PPO scales no loss: its gradients are too small for it",
            "Use dtype=bfloat16 or float32.",
        )  # fmt: skip
        require(
            self.tripwires.disagreement is None or config.reward.name == "ensemble",
            "stage.tripwires.disagreement",
            self.tripwires.disagreement,
            f"reward={config.reward.name} has no members that could contradict each other",
            "Use reward=ensemble, or leave it empty.",
        )
