"""What the settings of PPO are to the functions that learn: their arguments, read out of a configuration once."""

from __future__ import annotations

from typing import Any

from align.config.ppo import PpoConfig
from align.config.root import Config
from align.ppo.advantages import Estimator
from align.ppo.update import Losses


def shaping_arguments(stage: PpoConfig) -> dict[str, Any]:
    """Arguments of `shaped_scores`."""
    return {key: getattr(stage, key) for key in ("score_scale", "score_clip", "missing_eos_penalty")}


def estimate_arguments(config: Config) -> dict[str, Any]:
    """Arguments of `estimated`."""
    chosen = {key: getattr(config.stage, key) for key in ("micro_batch", "minibatches")}
    return {"temperature": config.rollout.temperature, "bootstrap": config.stage.bootstrap_truncated, **chosen}


def experience_arguments(stage: PpoConfig, kl_coef: float) -> dict[str, Any]:
    """Arguments of `experience`, from a configuration, with the present coefficient of KL."""
    chosen = {key: getattr(stage, key) for key in ("kl_estimator", "whiten_rewards")}
    return {
        "kl_coef": kl_coef, "kl_in_reward": stage.kl_in == "reward", "estimator": estimator_of(stage), **chosen
    }  # fmt: skip


def estimator_of(stage: PpoConfig) -> Estimator:
    return Estimator(stage.advantage, stage.per_prompt, stage.scale_rewards, stage.gamma, stage.lam)


def valued_by(stage: PpoConfig) -> str:
    """What the value head reads, see `Roles`."""
    return stage.value_backbone if stage.has_critic else "none"


def losses_of(config: Config, kl_coef: float) -> Losses:
    """What is minimised, with the present coefficient of KL."""
    stage: PpoConfig = config.stage
    assert stage.kl_estimator is not None
    return Losses(
        stage.clip_range, stage.clip_range_high, stage.importance_sampling_level, stage.effective_loss_mean,
        config.rollout.max_new_tokens, stage.value_clip_range, kl_coef if stage.kl_in == "loss" else 0.0,
        stage.kl_estimator,
    )  # fmt: skip
