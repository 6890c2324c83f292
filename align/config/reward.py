"""`stage=reward`: a reward model from preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.settings import Settings, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class RewardStageConfig(Settings):
    """A reward model: Bradley–Terry loss on pairs. The LoRA starts from the SFT adapter, and the head starts from zero.
    A batch counts rankings. A ranking of K answers is K texts to read, and a pair is a ranking of two."""

    AT: ClassVar[str] = "stage"

    name: str = "reward"
    lr: float | None = training.lr("reward")
    epochs: float = training.epochs()
    batch_size: int = training.batch_size("Rankings")
    micro_batch: int = training.micro_batch("Rankings")
    gradient_accumulation: int | None = training.gradient_accumulation()
    warmup: float = training.warmup(0.05)
    schedule: str = training.schedule()
    optimiser: str = training.optimiser()
    adam_beta1: float = training.adam_beta1()
    adam_beta2: float = training.adam_beta2()
    max_grad_norm: float = training.max_grad_norm()
    held_out: float = training.held_out()
    eval_every: int | None = training.eval_every()
    publish: str = training.publish()
    patience: int | None = training.patience()
    log_every: int = training.log_every()
    save_every: int = training.save_every(50)
    gradient_checkpointing: str = training.gradient_checkpointing()
    prioritise: bool = setting(
        False,

        "Write into the store how uncertain the model is about each item of the project. Needs data=annotations. If "
        "the project's `order` is `priority`, uncertain items are judged first.",
    )  # fmt: skip

    def check_together(self) -> None:
        training.settled_batch(self)
        training.measured_on_the_way(self.eval_every, self.publish, self.patience)

    def check(self, config: Config) -> None:
        training.of_pairs(config.data, self.held_out == type(self).held_out)
        require(
            config.data.name == "annotations" or not self.prioritise, "stage.prioritise", self.prioritise,
            "the items of a file are nobody's to judge", "Use data=annotations with project=NAME.",
        )  # fmt: skip
        require(
            config.method.name != "full", "method", config.method.name, "a reward model is an adapter and a head here",
            "Use method=qlora or method=lora.",
        )  # fmt: skip
