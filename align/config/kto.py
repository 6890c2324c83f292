"""`stage=kto`: answers with a label straight into an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.settings import Settings, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class KtoConfig(Settings):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024). It learns from single answers that were wanted or not,
    and needs no pairs. Of preference pairs, the chosen answer counts as wanted and the rejected one as unwanted."""

    AT: ClassVar[str] = "stage"

    name: str = "kto"
    beta: float = setting(0.1, "Price of moving away from the start, like `kl_coef` in PPO.", above=0)
    desirable_weight: float = setting(
        1.0, "What the loss of a wanted answer is multiplied by (lambda_D in the paper).", above=0
    )
    undesirable_weight: float = setting(
        1.0, "What the loss of an unwanted answer is multiplied by (lambda_U in the paper).", above=0
    )
    lr: float | None = training.lr("kto")
    epochs: float = training.epochs()
    batch_size: int = training.batch_size("Answers")
    micro_batch: int = training.micro_batch("Answers")
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

    def check_together(self) -> None:
        require(
            self.micro_batch > 1, "stage.micro_batch", self.micro_batch,
            "leaves no second answer in a micro-batch, and KTO estimates its KL from answers to other prompts there",
            "Use 2 or more.",
        )  # fmt: skip
        training.settled_batch(self)
        training.measured_on_the_way(self.eval_every, self.publish, self.patience)

    def check(self, config: Config) -> None:
        training.of_pairs(config.data, self.held_out == type(self).held_out)
        require(
            config.method.name != "full", "method", config.method.name, "KTO trains an adapter here",
            "Use method=qlora or method=lora.",
        )  # fmt: skip
