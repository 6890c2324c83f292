"""Mean and variance of a stream of numbers, updated a batch at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """The count, mean and sum of squared deviations from the mean, of a stream of numbers."""

    count: int
    mean: float
    deviations: float

    @classmethod
    def from_values(cls, values: Tensor) -> Moments:
        """Compute the moments of one batch of numbers, in fp64."""
        values = values.double()
        mean = values.mean()
        return cls(values.numel(), float(mean), float((values - mean).square().sum()))

    @property
    def std(self) -> float:
        """The standard deviation of the population (divided by n)."""
        return math.sqrt(self.deviations / self.count)

    def with_batch(self, values: Tensor) -> Moments:
        """Return new moments that include another batch, computed in one pass and without cancellation (Chan, Golub and
        LeVeque, 1979)."""
        batch = Moments.from_values(values)
        count = self.count + batch.count
        gap = batch.mean - self.mean
        mean = self.mean + gap * batch.count / count
        between = gap * gap * self.count * batch.count / count
        return Moments(count, mean, self.deviations + batch.deviations + between)

    def standardise(self, values: Tensor) -> Tensor:
        """Return (values − mean) / std with the mean and standard deviation of the stream."""
        return (values - self.mean) / self.std
