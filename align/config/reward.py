"""Settings of `stage=reward`, which trains a reward model on preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align.config import training


@dataclass
class RewardStageConfig(training.PreferenceTrainingConfig):
    """A reward model: Bradley–Terry loss on pairs. The LoRA starts from the SFT adapter, and the head starts from zero.
    A batch counts rankings. A ranking of K answers is K texts to read, and a pair is a ranking of two."""

    ADAPTER_ONLY: ClassVar[str] = "a reward model is an adapter and a head here"

    name: str = "reward"
    lr: float | None = training.declare_lr("reward")
    batch_size: int = training.declare_batch_size("Rankings")
    micro_batch: int = training.declare_micro_batch("Rankings")
