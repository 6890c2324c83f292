"""`stage=dpo`: preference pairs straight into an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from align.config import training
from align.config.settings import Settings, setting
from align.core.errors import require

if TYPE_CHECKING:
    from align.config.root import Config

BETAS: Mapping[str, float] = MappingProxyType({"sigmoid": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0})
"""Loss → its beta where nobody gives one."""
GAMMA = 1.0


@dataclass
class DpoConfig(Settings):
    """Direct preference optimisation (Rafailov et al., 2023). The reward is the policy's own logprobs minus those of
    its start, and the loss is Bradley–Terry on these rewards. `ipo` (Azar et al., 2023) does not push pairs
    apart without end. `orpo` (Hong et al., 2024) and `simpo` (Meng et al., 2024) need no reference."""

    AT: ClassVar[str] = "stage"

    name: str = "dpo"
    beta: float | None = setting(
        None,
        "Price of moving away from the start, like `kl_coef` in PPO. Of `orpo` it is the weight of the odds ratio "
        "(lambda in the paper), of `simpo` the scale of the reward. Empty: 0.1, and 2 with `simpo`.", above=0,
    )  # fmt: skip
    loss: str = setting("sigmoid", "The loss on a pair.", choices=tuple(BETAS))
    label_smoothing: float = setting(
        0.0,
        "Share of the pairs that are taken to be labelled the wrong way round (cDPO); for `sigmoid` alone.",
        at_least=0,
        below=0.5,
    )
    simpo_gamma: float = setting(
        GAMMA,
        "By how much the reward of the better answer is to exceed that of the other; for `simpo` alone.",
        at_least=0,
    )
    lr: float | None = training.lr("dpo")
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

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with its start, which is kept beside it."""
        return self.loss in ("sigmoid", "ipo")

    def check_together(self) -> None:
        for key, usual, loss in (("label_smoothing", 0.0, "sigmoid"), ("simpo_gamma", GAMMA, "simpo")):
            value = getattr(self, key)
            require(
                value == usual or self.loss == loss, f"stage.{key}", value, f"is not read by stage.loss={self.loss}",
                f"Drop it, or use stage.loss={loss}.",
            )  # fmt: skip
        if self.beta is None:  # a run that was given the usual one is the same run
            object.__setattr__(self, "beta", BETAS[self.loss])
        training.settled_batch(self)
        training.measured_on_the_way(self.eval_every, self.publish, self.patience)

    def check(self, config: Config) -> None:
        training.of_pairs(config.data, self.held_out == type(self).held_out)
        require(
            config.method.name != "full", "method", config.method.name, "DPO trains an adapter here",
            "Use method=qlora or method=lora.",
        )  # fmt: skip
