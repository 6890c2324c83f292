"""`stage=sft` and `stage=full`: supervised instruction tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from omegaconf import II

from align.config import training
from align.config.rates import describe_defaults
from align.config.settings import Settings, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class SftConfig(Settings):
    """Supervised instruction tuning. The loss counts only what the assistant says. LoRA needs about ten times the
    learning rate of full fine-tuning."""

    AT: ClassVar[str] = "stage"

    name: str = "sft"
    lr: float | None = setting(
        II("method.lr"),
        "Learning rate at its highest. If you do not set it, it is method.lr, and if that is empty too: by the size of "
        f"the base, for an adapter {describe_defaults('sft')}; with method=full {describe_defaults('full')}.",
        above=0,
    )
    epochs: float = training.epochs()
    max_steps: int | None = setting(
        None, "Training ends after this number of steps, whatever the number of epochs. Empty: no limit.", above=0
    )
    batch_size: int = training.batch_size()
    micro_batch: int = training.micro_batch()
    gradient_accumulation: int | None = training.gradient_accumulation()
    warmup: float = training.warmup(0.03)
    schedule: str = training.schedule()
    optimiser: str = training.optimiser()
    adam_beta1: float = training.adam_beta1()
    adam_beta2: float = training.adam_beta2()
    weight_decay: float = training.weight_decay()
    max_grad_norm: float = training.max_grad_norm()
    packing: bool = setting(False, "Put several short rows into one sequence, separated by their position ids.")
    eval_size: int = setting(256, "Number of held-out documents on which the loss is measured.", above=0)
    eval_every: int | None = training.eval_every()
    publish: str = training.publish()
    patience: int | None = training.patience()
    log_every: int = training.log_every()
    save_every: int = training.save_every(100)
    gradient_checkpointing: str = training.gradient_checkpointing()

    def check_together(self) -> None:
        require(self.name in ("sft", "full"), "stage.name", self.name, "is not a choice here", "Write stage=sft.")
        training.settled_batch(self)
        training.measured_on_the_way(self.eval_every, self.publish, self.patience)

    def check(self, config: Config) -> None:
        full = config.method.name == "full"
        require(
            self.name != "full" or full, "method", config.method.name, "stage=full trains every weight",
            "Drop method=, or use stage=sft for adapters.",
        )  # fmt: skip
        require(
            self.name != "sft" or not full, "method", config.method.name, "stage=sft trains an adapter",
            "Use stage=full, which is the same stage with every weight trained.",
        )  # fmt: skip
        require(
            config.data.name != "annotations", "data", config.data.name,
            "holds preference pairs, not conversations to imitate", "Use data=chitchat or data=files.",
        )  # fmt: skip
