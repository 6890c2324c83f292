"""Settings of `stage=dpo`, which trains an adapter on preference pairs with DPO, IPO, ORPO or SimPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.settings import setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config

BETAS: Mapping[str, float] = MappingProxyType({"sigmoid": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0})
"""Value of `stage.loss` → default of `stage.beta`."""
GAMMA = 1.0


@dataclass
class DpoConfig(training.PreferenceTrainingConfig):
    """Direct preference optimisation (Rafailov et al., 2023). The reward is the policy's own logprobs minus those of
    its start, and the loss is Bradley–Terry on these rewards. `ipo` (Azar et al., 2023) does not push pairs
    apart without end. `orpo` (Hong et al., 2024) and `simpo` (Meng et al., 2024) need no reference."""

    ADAPTER_ONLY: ClassVar[str] = "DPO trains an adapter here"

    name: str = "dpo"
    lr: float | None = training.declare_lr("dpo")
    batch_size: int = training.declare_batch_size("Pairs")
    micro_batch: int = training.declare_micro_batch("Pairs")
    beta: float | None = setting(
        None,
        "Weight of the penalty for moving away from the start, like `kl_coef` in PPO. For `orpo` it is the weight of "
        "the odds ratio (lambda in the paper), for `simpo` the scale of the reward. Empty: 0.1, and 2 with `simpo`.",
        above=0,
    )
    loss: str = setting("sigmoid", "The loss on a pair.", choices=tuple(BETAS))
    label_smoothing: float = setting(
        0.0,
        "Assumed share of pairs with swapped labels (cDPO). Only for `sigmoid`.",
        at_least=0,
        below=0.5,
    )
    simpo_gamma: float = setting(
        GAMMA,
        "Target margin: how far the reward of the chosen answer should exceed that of the rejected one. Only for "
        "`simpo`.",
        at_least=0,
    )

    @property
    def has_reference(self) -> bool:
        """True if the loss (DPO or IPO) needs a reference model, which is the policy before training."""
        return self.loss in ("sigmoid", "ipo")

    def check_together(self) -> None:
        for key, default, loss in (("label_smoothing", 0.0, "sigmoid"), ("simpo_gamma", GAMMA, "simpo")):
            value = getattr(self, key)
            problem = f"is not read by stage.loss={self.loss}"
            is_read = value == default or self.loss == loss
            require(is_read, f"stage.{key}", value, problem, f"Drop it, or use stage.loss={loss}.")
        if self.beta is None:  # so that a run with the default written out is the same run
            object.__setattr__(self, "beta", BETAS[self.loss])
        super().check_together()

    def check(self, config: Config) -> None:
        super().check(config)
        is_soft = config.data.soft_labels
        problem = f"is not read by stage.loss={self.loss}"
        remedy = "Drop it, or use stage.loss=sigmoid."
        require(not is_soft or self.loss == "sigmoid", "data.soft_labels", is_soft, problem, remedy)
