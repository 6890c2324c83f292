"""What one update hands to the next besides weights and the optimiser's moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from align.ops.moments import Moments


@dataclass(frozen=True, slots=True)
class Best:
    """The policy with the highest objective on held-out prompts so far.

    Attributes:
        update: after how many updates it stood.
        objective: its mean held-out score less `kl_coef` times its KL.
        weights: its trained tensors, in the order of the policy's parameters, on the CPU.
    """

    update: int
    objective: float
    weights: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class State:
    """A run between two updates.

    Attributes:
        kl_coef: in force for the next update.
        moments: of the raw scores, which standardise the next ones.
        strikes: how many updates in a row each tripwire has been crossed.
        best: None before the first held-out evaluation.
        sampler: the policy's weights with which the next update's answers are drawn, in the order of its parameters;
            empty where the policy draws them as it stands.
        start_variety: how much the start's greedy answers to held-out prompts differ; empty if that is not watched.
    """

    kl_coef: float
    moments: Moments
    strikes: Mapping[str, int] = field(default_factory=dict)
    best: Best | None = None
    sampler: tuple[Tensor, ...] = ()
    start_variety: Mapping[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """All but tensors, as JSON; which keeps a float to the bit."""
        best = {"update": self.best.update, "objective": self.best.objective} if self.best else None
        return {
            "kl_coef": self.kl_coef,
            "moments": asdict(self.moments),
            "strikes": dict(self.strikes),
            "best": best,
            "start_variety": dict(self.start_variety),
        }

    @classmethod
    def of(cls, numbers: Mapping[str, Any], best: tuple[Tensor, ...], sampler: tuple[Tensor, ...] = ()) -> State:
        """The inverse of `numbers`, with the tensors of the best policy and of the one that draws."""
        kept = Best(**numbers["best"], weights=best) if numbers["best"] else None
        moments = Moments(**numbers["moments"])
        return cls(numbers["kl_coef"], moments, numbers["strikes"], kept, sampler, numbers["start_variety"])
