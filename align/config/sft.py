"""Settings of `stage=sft` and `stage=full`, supervised fine-tuning of an adapter or of all weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from align.config import training
from align.config.rates import describe_defaults
from align.config.settings import setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class SftConfig(training.TrainingConfig):
    """Supervised instruction tuning. The loss counts only what the assistant says. LoRA needs about ten times the
    learning rate of full fine-tuning."""

    name: str = "sft"
    lr: float | None = setting(
        II("method.lr"),
        "Learning rate at its highest. If you do not set it, it is method.lr, and if that is empty too: by the size of "
        f"the base, for an adapter {describe_defaults('sft')}; with method=full {describe_defaults('full')}.",
        above=0,
    )
    max_steps: int | None = setting(
        None, "Training ends after this number of steps, whatever the number of epochs. Empty: no limit.", above=0
    )
    warmup: float = training.declare_warmup(0.03)
    weight_decay: float = training.declare_weight_decay()
    packing: bool = setting(False, "Put several short rows into one sequence, separated by their position ids.")
    eval_size: int = setting(256, "Number of held-out documents on which the loss is measured.", above=0)
    save_every: int = training.declare_save_every(100)

    def check_together(self) -> None:
        require(self.name in ("sft", "full"), "stage.name", self.name, "is not a choice here", "Write stage=sft.")
        super().check_together()

    def check(self, config: Config) -> None:
        method = config.method.name
        remedy = "Drop method=, or use stage=sft for adapters."
        trains_all = self.name != "full" or method == "full"
        require(trains_all, "method", method, "stage=full trains every weight", remedy)
        remedy = "Use stage=full, which is the same stage with every weight trained."
        has_adapter = self.name != "sft" or method != "full"
        require(has_adapter, "method", method, "stage=sft trains an adapter", remedy)
        require(
            config.data.name != "annotations",
            "data",
            config.data.name,
            "holds preference pairs, not conversations to imitate",
            "Use data=chitchat or data=files.",
        )
