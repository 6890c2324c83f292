"""Settings of `stage=reward`, which trains a reward model on preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.settings import setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class RewardStageConfig(training.PreferenceTrainingConfig):
    """A reward model: Bradley–Terry loss on pairs. The LoRA starts from the SFT adapter, and the head starts from zero.
    A batch counts rankings. A ranking of K answers is K texts to read, and a pair is a ranking of two."""

    ADAPTER_ONLY: ClassVar[str] = "a reward model is an adapter and a head here"

    name: str = "reward"
    lr: float | None = training.declare_lr("reward")
    batch_size: int = training.declare_batch_size("Rankings")
    micro_batch: int = training.declare_micro_batch("Rankings")
    prioritise: bool = setting(
        False,
        "Write into the store how uncertain the model is about each item of the project. Needs data=annotations. If "
        "the project's `order` is `priority`, uncertain items are judged first.",
    )

    def check(self, config: Config) -> None:
        super().check(config)
        require(
            config.data.name == "annotations" or not self.prioritise,
            "stage.prioritise",
            self.prioritise,
            "the rows of a file are no items of an annotation project",
            "Use data=annotations with project=NAME.",
        )
