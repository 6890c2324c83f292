"""Mean and variance of a stream of numbers, a batch at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Of `count` numbers: their mean, and the sum of their squared deviations from it."""

    count: int
    mean: float
    deviations: float

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of one batch."""
        values = values.double()
        mean = values.mean()
        return cls(values.numel(), float(mean), float((values - mean).square().sum()))

    @property
    def std(self) -> float:
        """The standard deviation of the population (divided by n)."""
        return math.sqrt(self.deviations / self.count)

    def joined(self, values: Tensor) -> Moments:
        """With another batch. Chan, Golub and LeVeque (1979): no number is looked at twice, and nothing cancels."""
        other = Moments.of(values)
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * other.count / count
        between = gap * gap * self.count * other.count / count
        return Moments(count, mean, self.deviations + other.deviations + between)

    def standardised(self, values: Tensor) -> Tensor:
        """(values − mean) / std."""
        return (values - self.mean) / self.std
