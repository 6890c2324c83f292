"""`stage=dpo`: preference pairs straight into an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.settings import Settings, setting
from align.errors import require

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class DpoConfig(Settings):
    """Direct preference optimisation (Rafailov et al., 2023). The reward is the policy's own logprobs minus those of
    its start, and the loss is Bradley–Terry on these rewards. `ipo` (Azar et al., 2023) does not push pairs
    apart without end."""

    AT: ClassVar[str] = "stage"

    name: str = "dpo"
    beta: float = setting(0.1, "Price of moving away from the start, like `kl_coef` in PPO.", above=0)
    loss: str = setting("sigmoid", "The loss on a pair.", choices=("sigmoid", "ipo"))
    lr: float = setting(1e-4, "Learning rate at its highest.", above=0)
    epochs: float = training.epochs()
    batch_size: int = training.batch_size("Pairs")
    micro_batch: int = training.micro_batch("Pairs")
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
        training.settled_batch(self)
        training.measured_on_the_way(self.eval_every, self.publish, self.patience)

    def check(self, config: Config) -> None:
        training.of_pairs(config.data, self.held_out == type(self).held_out)
        require(
            config.method.name != "full", "method", config.method.name, "DPO trains an adapter here",
            "Use method=qlora or method=lora.",
        )  # fmt: skip
