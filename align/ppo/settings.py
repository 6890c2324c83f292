"""The settings of a PPO run as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.ppo.experience import Estimator
from align.ppo.update import Losses


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoSettings:
    """The settings of the PPO loop. docs/settings.md explains those that have the name of a key of `stage`.

    Attributes:
        temperature, max_new_tokens: of the rollout.
        hides_reasoning: whether the scorer reads answers without their reasoning.
        servers: number of servers that sample the answers; 0 if the learner samples them itself.
        max_gap: largest mean difference between the logprobs of the servers and of the learner, in nats a token.
        dtype: name of the dtype of the computation.
        first_ratio: bound of `require_first_ratio` for this dtype, in nats.
        estimator: how advantages are estimated.
        losses: what is minimised, with a KL coefficient of 0.
        kl_in_reward: whether the KL penalty is a part of each token's reward; else it is a part of the loss.
        per_prompt: answers to each prompt.
        wires: tripwire → its limit; None for one that is not checked.
        stops: whether a tripwire ends the run.
        suspects: largest number of prompts that `find_suspects` returns.
    """

    seed: int
    temperature: float
    max_new_tokens: int
    hides_reasoning: bool
    servers: int
    max_gap: float
    dtype: str
    first_ratio: float
    estimator: Estimator
    losses: Losses
    kl_in_reward: bool
    wires: Mapping[str, float | None]
    patience: int
    stops: bool
    suspects: int
    updates: int
    batch_size: int
    per_prompt: int
    max_draws: int
    max_staleness: int
    importance_cap: float
    epochs: int
    minibatches: int
    micro_batch: int
    max_approx_kl: float | None
    max_grad_norm: float
    weight_decay: float
    lr: float
    value_lr: float | None
    warmup: float
    schedule: str
    kl_coef: float
    kl_control: str
    kl_target: float
    kl_horizon: float
    kl_estimator: str
    whiten_rewards: bool
    bootstrap_truncated: bool
    normalise: str
    normalise_on: int
    score_scale: float
    score_clip: float | None
    missing_eos_penalty: float
    eval_every: int | None
    shown: int
    publish: str
    save_every: int
    checkpoints: int

    @property
    def shaping(self) -> dict[str, Any]:
        """The keyword arguments of `shape_scores`: score scale, score clip and the penalty for a missing end of
        sequence."""
        return {
            "score_scale": self.score_scale,
            "score_clip": self.score_clip,
            "missing_eos_penalty": self.missing_eos_penalty,
        }

    def experience_arguments(self, kl_coef: float) -> dict[str, Any]:
        """Return the keyword arguments of `assemble_experience` for the current KL coefficient."""
        return {
            "kl_coef": kl_coef,
            "kl_in_reward": self.kl_in_reward,
            "kl_estimator": self.kl_estimator,
            "whiten_rewards": self.whiten_rewards,
            "estimator": self.estimator,
        }

    def losses_at(self, kl_coef: float) -> Losses:
        """Return the loss settings with the current KL coefficient, or with 0 if the KL penalty is part of the
        reward."""
        return self.losses._replace(kl_coef=0.0 if self.kl_in_reward else kl_coef)
