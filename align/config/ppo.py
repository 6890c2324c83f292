"""`stage=ppo`: proximal policy optimisation on an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.settings import Settings, setting
from align.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


ADAPTER_LR = 5e-4


@dataclass
class TripwireConfig(Settings):
    """Signs of over-optimisation, checked at every update. Empty: not checked."""

    AT: ClassVar[str] = "stage.tripwires"

    length_correlation: float | None = setting(0.8, "Warn where the correlation of score and length is above it.")
    disagreement: float | None = setting(
        None, "Warn where the standard deviation of an ensemble's members is above it (reward=ensemble)."
    )
    kl: float | None = setting(15.0, "Warn where the KL to the reference is above it.", unit="nats a response")
    entropy: float | None = setting(0.3, "Warn where the policy's entropy is below it.", unit="nats a token")
    repetition: float | None = setting(0.3, "Warn where the share of repeated 3-grams is above it.")
    patience: int = setting(
        3, "Number of updates in a row that must cross a threshold before it makes a warning.", above=0
    )
    action: str = setting("warn", "`warn` only writes the warning. `stop` also ends the run.", choices=("warn", "stop"))
    suspects: int = setting(
        16, "Number of suspicious answers that go into the annotation store when a tripwire stops the run.", above=0
    )

    def limits(self) -> dict[str, float | None]:
        """Each wire's threshold."""
        names = ("length_correlation", "disagreement", "kl", "entropy", "repetition")
        return {name: getattr(self, name) for name in names}


@dataclass
class FirstRatioConfig(Settings):
    """How far π_new/π_old may be from 1 before the first step, for each dtype of the computation: the mean over tokens
    of |log π_new − log π_old|.

    Both are the same policy, read in batches of different shapes, so they may differ only by rounding. A larger
    difference means that padding or positions change the model's logits."""

    AT: ClassVar[str] = "stage.first_ratio"

    float32: float = setting(
        1e-3,
        "Largest mean of |log π_new − log π_old| that is allowed before the first step, with dtype=float32.",
        unit="nats",
        above=0,
    )
    bfloat16: float = setting(0.05, "The same with dtype=bfloat16.", unit="nats", above=0)


@dataclass
class PpoConfig(Settings):
    """PPO as in Ziegler et al. (2019) and Huang et al. (2024): KL to the reference as a per-token cost, the score at
    the last response token, GAE, clipped policy and value losses."""

    AT: ClassVar[str] = "stage"

    name: str = "ppo"
    updates: int = setting(
        60, "Number of updates of the policy. Each update samples a batch and learns from it.", above=0
    )
    batch_size: int = setting(64, "Responses that an update samples.", above=0)
    epochs: int = setting(2, "Passes over a batch.", above=0)
    minibatches: int = setting(2, "Number of optimiser steps in one pass.", above=0)
    micro_batch: int = setting(32, "Responses that go through the model at once; memory grows with it.", above=0)
    lr: float | None = setting(
        None,
        'Learning rate of the policy. Empty: 5e-4 for an adapter, and a tenth of it if every weight trains ("LoRA '
        'Without Regret", 2025).', above=0,
    )  # fmt: skip
    value_backbone: str = setting(
        "own",
        "What the value head reads. `own`: a separate adapter, which starts as a copy of the reward model's. "
        "`policy`: the policy's states, which saves a pass. `frozen`: the reward model's states. If the reward is not "
        "a model on this base, the policy's start takes the reward model's place.",
        choices=("own", "policy", "frozen"),
    )  # fmt: skip
    value_lr: float = setting(1e-3, "Learning rate of the value head and its adapter.", above=0)
    warmup: float = training.warmup(0.05, most=1)
    schedule: str = training.schedule("constant")
    clip_range: float = setting(0.2, "The ratio π_new/π_old is clipped to 1 ± clip_range.", above=0)
    value_clip_range: float | None = setting(None, "Largest change of a value in one update. Empty: no limit.", above=0)
    importance_cap: float = setting(
        2.0,
        "Largest weight of a token's loss with rollout=vllm. The weight is π_old over the probability that the server "
        "drew the token with.", at_least=1, later=True,
    )  # fmt: skip
    max_staleness: int = setting(
        0,
        "With 1 and rollout=vllm, the server answers the prompts of the next update while the policy learns from this "
        "one. It answers by the policy as it is before that.", unit="updates", at_least=0, at_most=1, later=True,
    )  # fmt: skip
    max_approx_kl: float | None = setting(
        None, "End an update's passes when the policy has moved this far. Empty: never.", unit="nats a token", above=0
    )
    gamma: float = setting(1.0, "Discount for each token.", above=0, at_most=1)
    lam: float = setting(0.95, "λ of GAE.", at_least=0, at_most=1)
    kl_coef: float = setting(
        0.05, "Price of moving away from the reference, in units of reward for each nat.", at_least=0
    )
    kl_control: str = setting(
        "fixed", "`adaptive` changes kl_coef so that the KL approaches kl_target.", choices=("fixed", "adaptive")
    )
    kl_target: float = setting(6.0, "KL that kl_control=adaptive aims at.", unit="nats a response", above=0)
    kl_horizon: float = setting(10_000.0, "How slowly kl_control=adaptive changes kl_coef.", unit="responses", above=0)
    kl_estimator: str = setting(
        "k1", "Which of Schulman's estimators computes the KL from samples.", choices=("k1", "k3")
    )
    kl_in: str = setting(
        "reward", "Where the KL penalty is: in each token's reward, or in the loss.", choices=("reward", "loss")
    )
    score_scale: float = setting(
        0.4,
        "Factor on the standardised score (mean 0, variance 1 over reference samples). Together with kl_coef it sets "
        "how much KL a higher score is worth.", above=0,
    )  # fmt: skip
    score_clip: float | None = setting(
        None,
        "The standardised score is clipped to ± score_clip. Empty: not clipped.",
        unit="standard deviations",
        above=0,
    )
    missing_eos_penalty: float = setting(0.3, "Subtracted from the score of a response that does not end.", at_least=0)
    whiten_rewards: bool = setting(False, "Scale a batch's rewards to variance 1.")
    bootstrap_truncated: bool = setting(
        False, "Treat a cut response as one that continues: its last state has its estimated value instead of 0."
    )
    normalise: str = setting(
        "once",
        "How scores are standardised. `once`: mean and variance are measured once, on the reference's samples. "
        "`running`: measuring continues. `off`: scores are not standardised.", choices=("once", "running", "off"),
    )  # fmt: skip
    normalise_on: int = setting(256, "Number of reference samples on which mean and variance are measured.", above=0)
    max_grad_norm: float = training.max_grad_norm()
    weight_decay: float = training.weight_decay()
    gradient_checkpointing: str = training.gradient_checkpointing()
    eval_every: int | None = setting(
        None,
        "Updates between two measurements on prompts that nothing trains on. The start is measured too. Empty: no "
        "measurements.", above=0,
    )  # fmt: skip
    eval_prompts: int = setting(
        64, "Number of prompts for eval_every. They come from data.eval_path, or are kept out of training.", above=0
    )
    shown: int = setting(4, "Number of answers of each measurement that samples.jsonl keeps.", above=0)
    publish: str = setting(
        "best", "What a run with eval_every publishes: the best measured update, or the last update.",
        choices=("best", "last"),
    )  # fmt: skip
    save_every: int = training.save_every(10, "Updates")
    checkpoints: int = setting(2, "Number of newest checkpoints that are kept.", above=0)
    first_ratio: FirstRatioConfig = field(default_factory=FirstRatioConfig)
    tripwires: TripwireConfig = field(default_factory=TripwireConfig)

    def check_together(self) -> None:
        require(
            self.kl_in != "loss" or self.kl_estimator == "k3", "stage.kl_estimator", self.kl_estimator,
            "has a gradient of expectation zero, so in the loss it would hold nothing back",
            "Add stage.kl_estimator=k3.",
        )  # fmt: skip
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
            self.batch_size % self.minibatches == 0, "stage.batch_size", self.batch_size,
            f"is not a multiple of stage.minibatches={self.minibatches}",
            "Make it one, so that every minibatch has the same size.",
        )  # fmt: skip
        minibatch = self.batch_size // self.minibatches
        require(
            minibatch % min(self.micro_batch, minibatch) == 0, "stage.micro_batch", self.micro_batch,
            f"does not divide the minibatch of {minibatch}", "Choose a divisor.",
        )  # fmt: skip

    def filled(self, config: Config) -> PpoConfig:
        """With a learning rate, which depends on what trains."""
        lr = ADAPTER_LR / 10 if config.method.name == "full" else ADAPTER_LR
        return self if self.lr is not None else replace(self, lr=lr)

    def check(self, config: Config) -> None:
        require(
            config.rollout.engine != "vllm" or config.method.name != "full", "rollout.engine", "vllm",
            "answers by adapters alone, and method=full has none", "Use rollout=hf.",
        )  # fmt: skip
        require(
            self.max_staleness == 0 or config.rollout.engine == "vllm", "stage.max_staleness", self.max_staleness,
            f"rollout.engine={config.rollout.engine} samples in this process, which learns meanwhile",
            "Add rollout=vllm, or leave it out.",
        )  # fmt: skip
        require(
            self.importance_cap == PpoConfig.importance_cap or config.rollout.engine == "vllm", "stage.importance_cap",
            self.importance_cap, f"rollout.engine={config.rollout.engine} draws by the very policy that learns",
            "Add rollout=vllm, or leave it out.",
        )  # fmt: skip
        require(
            config.dtype != "float16", "dtype", config.dtype, "PPO scales no loss: its gradients are too small for it",
            "Use dtype=bfloat16 or float32.",
        )  # fmt: skip
        require(
            self.tripwires.disagreement is None or config.reward.name == "ensemble", "stage.tripwires.disagreement",
            self.tripwires.disagreement,
            f"reward={config.reward.name} has no members that could contradict each other",
            "Use reward=ensemble, or leave it empty.",
        )  # fmt: skip
