"""Settings of `stage=ppo`, which trains a policy against a reward with PPO, RLOO, GRPO or REINFORCE++."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.rates import SIZE_CLASSES, describe_defaults
from align.config.settings import Settings, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


GROUPED = ("rloo", "grpo")
"""Advantage estimators that compare several answers to the same prompt."""
GROUP = 8
"""Default number of answers to each prompt for the estimators that compare them."""
OF_CRITIC = ("value_backbone", "value_lr", "value_clip_range", "lam", "bootstrap_truncated", "whiten_rewards")
"""Names of the settings that only an advantage estimator with a critic (GAE) reads."""

OF_REWARD = {
    "k2": "is biased as a part of the reward",
    "k3": "as a part of the reward does not restrain the policy: its gradient is that of KL(policy ‖ reference) less "
    "that of KL(reference ‖ policy), and near the reference these are equal",
}
"""KL estimator → reason why it may not be used in the reward. A policy gradient treats the reward as a constant, and
only the gradient of k1 itself has expectation zero (Tang and Munos, "On a few pitfalls in KL divergence gradient
estimation for RL", 2025)."""


@dataclass
class TripwireConfig(Settings):
    """Signs of over-optimisation, checked at every update. Empty: not checked."""

    AT: ClassVar[str] = "stage.tripwires"

    length_correlation: float | None = setting(0.8, "Warn if the correlation of score and length is above this value.")
    disagreement: float | None = setting(
        None, "Warn if the standard deviation of the members of reward=ensemble is above this value."
    )
    kl: float | None = setting(15.0, "Warn if the KL to the reference is above this value.", unit="nats a response")
    entropy: float | None = setting(0.3, "Warn if the policy's entropy is below this value.", unit="nats a token")
    repetition: float | None = setting(0.3, "Warn if the share of repeated 3-grams is above this value.")
    collapse: bool = setting(
        True,
        "Warn if the greedy answers to the prompts of `eval_every` are nearly alike. Needs at least 64 distinct "
        "prompts. `patience` does not apply.",
    )
    patience: int = setting(
        3, "Number of consecutive updates that must cross a threshold before a warning is given.", above=0
    )
    action: str = setting("warn", "`warn` only writes the warning. `stop` also ends the run.", choices=("warn", "stop"))
    suspects: int = setting(
        16, "Number of suspicious answers that go into the annotation store when a tripwire stops the run.", above=0
    )

    def limits(self) -> dict[str, float | None]:
        """Return a mapping from each sign of over-optimisation to its threshold, or to None if it is not checked."""
        names = ("length_correlation", "disagreement", "kl", "entropy", "repetition")
        return {**{name: getattr(self, name) for name in names}, "collapse": 0.5 if self.collapse else None}


@dataclass
class FirstRatioConfig(Settings):
    """Bounds of the difference of π_new/π_old from 1 before the first step, for each dtype of the computation: the mean
    over tokens of |log π_new − log π_old|.

    Both are the same policy, read in batches of different shapes, so they may differ only by rounding. A larger
    difference means that padding or positions change the model's logits."""

    AT: ClassVar[str] = "stage.first_ratio"

    float32: float = setting(
        1e-3,
        "Largest mean of |log π_new − log π_old| that is allowed before the first step, with dtype=float32.",
        unit="nats",
        above=0,
    )
    bfloat16: float = setting(
        0.05,
        "Largest mean of |log π_new − log π_old| that is allowed before the first step, with dtype=bfloat16.",
        unit="nats",
        above=0,
    )


@dataclass
class PpoConfig(Settings):
    """PPO as in Ziegler et al. (2019) and Huang et al. (2024): KL to the reference as a per-token cost, the score at
    the last response token, GAE, clipped policy and value losses. `stage.advantage` makes it RLOO, GRPO or
    REINFORCE++."""

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
        f"Learning rate of the policy. Empty: by the size of the base, for an adapter {describe_defaults('ppo')}; a "
        "tenth of that if every weight trains.",
        above=0,
    )
    advantage: str = setting(
        "gae",
        "How advantages are estimated. `gae`: with a critic (PPO). `rloo`: the reward less the mean of the other "
        "answers to the prompt. `grpo`: the reward less the mean of all answers to the prompt, divided as "
        "scale_rewards says. `reinforce_pp` (REINFORCE++): the return from each token on, whitened over the batch. "
        "Only `gae` trains a value model.",
        choices=("gae", "rloo", "grpo", "reinforce_pp"),
    )
    group_size: int | None = setting(
        None,
        "Answers to each prompt. Empty: 8 with advantage=rloo or grpo, else 1. With advantage=reinforce_pp and more "
        "than one, the mean of a prompt's answers is the baseline.",
        above=0,
    )
    scale_rewards: str = setting(
        "group",
        "What divides the advantages of advantage=grpo: the standard deviation of the rewards of the prompt's answers, "
        "that of the whole batch, or nothing (Dr. GRPO).",
        choices=("group", "batch", "none"),
    )
    max_draws: int = setting(
        1,
        "How often an update may sample. Above 1, prompts whose answers all have the same reward are replaced by "
        "other prompts (dynamic sampling, DAPO).",
        above=0,
    )
    value_backbone: str = setting(
        "own",
        "What the value head reads. `own`: a separate adapter, which starts as a copy of the reward model's. "
        "`policy`: the policy's states, which saves a pass. `frozen`: the reward model's states. If the reward is not "
        "a model on this base, the model that the policy starts from takes the reward model's place.",
        choices=("own", "policy", "frozen"),
    )
    value_lr: float | None = setting(
        None,
        "Learning rate of the value head and its adapter. Empty: by the size of the base, "
        f"{describe_defaults('value')}.",
        above=0,
    )
    warmup: float = training.declare_warmup(0.05, max_share=1)
    schedule: str = training.declare_schedule("constant")
    clip_range: float = setting(0.2, "The ratio π_new/π_old is clipped to 1 ± clip_range.", above=0)
    clip_range_high: float | None = setting(
        None,
        "Upper bound of the ratio, as 1 + clip_range_high (clip-higher, DAPO). Empty: clip_range.",
        above=0,
    )
    importance_sampling_level: str = setting(
        "token",
        "What the ratio π_new/π_old is computed for: each token, or each whole answer (`sequence`, GSPO).",
        choices=("token", "sequence"),
    )
    loss_mean: str | None = setting(
        None,
        "What the policy loss is a mean over. `token`: all tokens of a minibatch. `sequence`: its answers, each with "
        "the mean of its tokens. `constant`: the sum over tokens is divided by rollout.max_new_tokens for each answer, "
        "which is unbiased. Empty: `constant` with advantage=rloo, else `token`.",
        choices=("token", "sequence", "constant"),
    )
    value_clip_range: float | None = setting(None, "Largest change of a value in one update. Empty: no limit.", above=0)
    importance_cap: float = setting(
        2.0,
        "Largest weight of a token's loss with rollout=vllm. The weight is π_old over the probability that the server "
        "drew the token with.",
        at_least=1,
    )
    max_staleness: int = setting(
        0,
        "With 1 and rollout=vllm, the server answers the prompts of the next update while the policy learns from this "
        "one. These answers come from the policy before this update.",
        unit="updates",
        at_least=0,
        at_most=1,
    )
    max_approx_kl: float | None = setting(
        None, "End an update's passes when the policy has moved this far. Empty: never.", unit="nats a token", above=0
    )
    gamma: float = setting(1.0, "Discount for each token.", above=0, at_most=1)
    lam: float = setting(0.95, "λ of GAE.", at_least=0, at_most=1)
    kl_coef: float = setting(
        0.05,
        "Weight of the penalty for moving away from the reference, in units of reward for each nat of KL.",
        at_least=0,
    )
    kl_control: str = setting(
        "fixed", "`adaptive` changes kl_coef so that the KL approaches kl_target.", choices=("fixed", "adaptive")
    )
    kl_target: float = setting(6.0, "KL that kl_control=adaptive aims at.", unit="nats a response", above=0)
    kl_horizon: float = setting(
        10_000.0,
        "Number of responses over which kl_control=adaptive changes kl_coef; larger is slower.",
        unit="responses",
        above=0,
    )
    kl_estimator: str | None = setting(
        None,
        "Which of Schulman's estimators computes the KL from samples: `k1` with kl_in=reward, `k3` or `k2` with "
        "kl_in=loss. Empty: the first of them.",
        choices=("k1", "k2", "k3"),
    )
    kl_in: str | None = setting(
        None,
        "Where the KL penalty is: in each token's reward, or in the loss. Empty: in the loss with advantage=grpo, else "
        "in the reward.",
        choices=("reward", "loss"),
    )
    score_scale: float = setting(
        0.4,
        "Factor on the standardised score (mean 0, variance 1 over reference samples). Together with kl_coef it sets "
        "how much KL a higher score is worth.",
        above=0,
    )
    score_clip: float | None = setting(
        None,
        "The standardised score is clipped to ± score_clip. Empty: not clipped.",
        unit="standard deviations",
        above=0,
    )
    missing_eos_penalty: float = setting(0.3, "Subtracted from the score of a response that does not end.", at_least=0)
    whiten_rewards: bool = setting(False, "Scale a batch's rewards to variance 1.")
    bootstrap_truncated: bool = setting(
        False,
        "Treat a response that was cut at rollout.max_new_tokens as unfinished: the value after its last token "
        "is the value model's estimate instead of 0.",
    )
    normalise: str = setting(
        "once",
        "How scores are standardised. `once`: mean and variance are measured once, on the reference's samples. "
        "`running`: measuring continues. `off`: scores are not standardised.",
        choices=("once", "running", "off"),
    )
    normalise_on: int = setting(256, "Number of reference samples on which mean and variance are measured.", above=0)
    max_grad_norm: float = training.declare_max_grad_norm()
    weight_decay: float = training.declare_weight_decay()
    gradient_checkpointing: str = training.declare_gradient_checkpointing()
    eval_every: int | None = setting(
        None,
        "Updates between two measurements on prompts that nothing trains on. The start is measured too. Empty: no "
        "measurements.",
        above=0,
    )
    eval_prompts: int = setting(
        64, "Number of prompts for eval_every. They come from data.eval_path, or are kept out of training.", above=0
    )
    shown: int = setting(4, "Number of answers of each measurement that samples.jsonl keeps.", above=0)
    publish: str = setting(
        "best",
        "What a run with eval_every publishes: the best measured update, or the last update.",
        choices=("best", "last"),
    )
    save_every: int = training.declare_save_every(10, "Updates")
    checkpoints: int = setting(2, "Number of newest checkpoints that are kept.", above=0)
    first_ratio: FirstRatioConfig = field(default_factory=FirstRatioConfig)
    tripwires: TripwireConfig = field(default_factory=TripwireConfig)

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def per_prompt(self) -> int:
        """Number of answers sampled to each prompt: `group_size`, or the estimator's default."""
        return self.group_size or (GROUP if self.advantage in GROUPED else 1)

    @property
    def effective_loss_mean(self) -> str:
        """The kind of mean over tokens that the loss is: `loss_mean`, or its default for the advantage estimator."""
        return self.loss_mean or self.default_loss_mean

    @property
    def default_loss_mean(self) -> str:
        return "constant" if self.advantage == "rloo" else "token"

    @property
    def effective_kl_in(self) -> str:
        """`reward` or `loss`, to which the KL penalty is added: `kl_in`, or the advantage estimator's default."""
        return self.kl_in or ("loss" if self.advantage == "grpo" else "reward")

    def check_together(self) -> None:
        self.check_groups()
        self.check_estimator()
        kl_estimator = self.kl_estimator
        if self.effective_kl_in == "loss":
            problem = "has a gradient of expectation zero, so it has no effect in the loss"
            remedy = "Add stage.kl_estimator=k3 or k2."
            require(kl_estimator != "k1", "stage.kl_estimator", kl_estimator, problem, remedy)
        else:
            problem = OF_REWARD.get(kl_estimator or "", "")
            remedy = "Use k1, or add stage.kl_in=loss."
            require(kl_estimator in (None, "k1"), "stage.kl_estimator", kl_estimator, problem, remedy)
        if self.kl_control == "adaptive":
            problem = f"is less than stage.batch_size={self.batch_size}: one update could change kl_coef too much"
            remedy = "Raise it; Ziegler et al. have 10000."
            require(self.kl_horizon >= self.batch_size, "stage.kl_horizon", self.kl_horizon, problem, remedy)
            remedy = "Start from a value above 0, or use stage.kl_control=fixed."
            require(self.kl_coef > 0, "stage.kl_coef", self.kl_coef, "cannot be adapted: it would stay 0", remedy)
        problem = f"is more than stage.eval_prompts={self.eval_prompts}"
        require(self.shown <= self.eval_prompts, "stage.shown", self.shown, problem, "Show fewer.")
        problem = f"is not a multiple of stage.minibatches={self.minibatches}"
        remedy = "Make it one, so that every minibatch has the same size."
        require(self.batch_size % self.minibatches == 0, "stage.batch_size", self.batch_size, problem, remedy)
        minibatch = self.batch_size // self.minibatches
        divides = minibatch % min(self.micro_batch, minibatch) == 0
        problem = f"does not divide the minibatch of {minibatch}"
        require(divides, "stage.micro_batch", self.micro_batch, problem, "Choose a divisor.")

    def check_groups(self) -> None:
        """Raise InputError if `batch_size` is not a multiple of `group_size`, or a group has no answers to compare."""
        can_compare = self.advantage not in GROUPED or self.per_prompt > 1
        problem = f"leaves no other answer that advantage={self.advantage} could compare with"
        remedy = "Use 2 or more, or stage.advantage=gae or reinforce_pp."
        require(can_compare, "stage.group_size", self.group_size, problem, remedy)
        problem = f"is not a multiple of stage.group_size={self.per_prompt}"
        remedy = "Make it one, so that every prompt has all its answers."
        require(self.batch_size % self.per_prompt == 0, "stage.batch_size", self.batch_size, problem, remedy)
        if self.advantage != "grpo":
            is_default = self.scale_rewards == PpoConfig.scale_rewards
            problem = f"is not read by stage.advantage={self.advantage}"
            remedy = "Leave it out, or use stage.advantage=grpo."
            require(is_default, "stage.scale_rewards", self.scale_rewards, problem, remedy)
        else:
            is_undivided = self.scale_rewards == "none" or self.effective_kl_in == "loss" or not self.kl_coef
            problem = (
                "makes answers with equal scores differ by their KL alone, and dividing by the standard deviation "
                "would turn that into full advantages"
            )
            remedy = "Use stage.kl_in=loss, or stage.scale_rewards=none."
            require(is_undivided, "stage.kl_in", "reward", problem, remedy)
        if self.max_draws > 1:
            problem = "looks for prompts whose answers differ in their score, and each has one answer"
            require(self.per_prompt > 1, "stage.max_draws", self.max_draws, problem, "Raise stage.group_size.")
            problem = "samples again after answers are scored, and stage.max_staleness=1 samples before that"
            require(not self.max_staleness, "stage.max_draws", self.max_draws, problem, "Leave one of them out.")

    def check_estimator(self) -> None:
        """Raise InputError if a setting is changed that the advantage estimator does not read."""
        if not self.has_critic:
            for name in OF_CRITIC:
                value = getattr(self, name)
                is_default = value == getattr(PpoConfig, name)
                is_default = is_default or (
                    name == "value_lr" and value in [size.rates["value"] for size in SIZE_CLASSES]
                )
                problem = f"is not read by stage.advantage={self.advantage}"
                require(is_default, f"stage.{name}", value, problem, "Leave it out, or use stage.advantage=gae.")
        if self.advantage in GROUPED:
            problem = f"discounts tokens, and advantage={self.advantage} rewards whole answers"
            require(self.gamma == 1, "stage.gamma", self.gamma, problem, "Leave it out.")
        else:
            level = self.importance_sampling_level
            problem = f"needs one advantage for a whole answer; advantage={self.advantage} has one for each token"
            remedy = "Use stage.advantage=grpo or rloo."
            require(level == "token", "stage.importance_sampling_level", level, problem, remedy)

    def with_derived_values(self, config: Config) -> PpoConfig:
        """Return a copy with derived defaults filled in, and with values that equal their default set to None.

        So a value that is written out and its default are the same run.
        """
        return replace(
            self,
            kl_in=self.effective_kl_in,
            kl_estimator=self.kl_estimator or ("k3" if self.effective_kl_in == "loss" else "k1"),
            group_size=self.per_prompt if self.per_prompt > 1 else None,
            loss_mean=None if self.loss_mean == self.default_loss_mean else self.loss_mean,
            clip_range_high=None if self.clip_range_high == self.clip_range else self.clip_range_high,
        )

    def check(self, config: Config) -> None:
        engine = config.rollout.engine
        has_adapter = engine == "hf" or config.method.name != "full"
        problem = "answers by adapters alone, and method=full has none"
        require(has_adapter, "rollout.engine", engine, problem, "Use rollout=hf.")
        remedy = "Add rollout=vllm, or leave it out."
        if engine != "vllm":
            problem = f"rollout.engine={engine} samples and trains in one process, so it cannot sample during training"
            require(self.max_staleness == 0, "stage.max_staleness", self.max_staleness, problem, remedy)
            is_default = self.importance_cap == PpoConfig.importance_cap
            problem = f"rollout.engine={engine} samples from the policy that is being trained"
            require(is_default, "stage.importance_cap", self.importance_cap, problem, remedy)
        problem = "PPO has no loss scaling, without which small gradients become 0 in float16"
        require(config.dtype != "float16", "dtype", config.dtype, problem, "Use dtype=bfloat16 or float32.")
        disagreement = self.tripwires.disagreement
        has_members = disagreement is None or config.reward.name == "ensemble"
        problem = f"reward={config.reward.name} has no members that could contradict each other"
        remedy = "Use reward=ensemble, or leave it empty."
        require(has_members, "stage.tripwires.disagreement", disagreement, problem, remedy)
