"""Settings of `stage=kto`, which trains an adapter on single answers labelled as wanted or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align.config import training
from align.config.settings import setting
from align.core.errors import require


@dataclass
class KtoConfig(training.PreferenceTrainingConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024). It learns from single answers that were wanted or not,
    and needs no pairs. Of preference pairs, the chosen answer counts as wanted and the rejected one as unwanted."""

    ADAPTER_ONLY: ClassVar[str] = "KTO trains an adapter here"

    name: str = "kto"
    lr: float | None = training.declare_lr("kto")
    batch_size: int = training.declare_batch_size("Answers")
    micro_batch: int = training.declare_micro_batch("Answers")
    beta: float = setting(0.1, "Weight of the penalty for moving away from the start, like `kl_coef` in PPO.", above=0)
    desirable_weight: float = setting(1.0, "Weight of the loss of wanted answers (lambda_D in the paper).", above=0)
    undesirable_weight: float = setting(1.0, "Weight of the loss of unwanted answers (lambda_U in the paper).", above=0)

    def check_together(self) -> None:
        problem = (
            "leaves no second answer in a micro-batch, and KTO estimates its KL from answers to other prompts there"
        )
        require(self.micro_batch > 1, "stage.micro_batch", self.micro_batch, problem, "Use 2 or more.")
        super().check_together()
