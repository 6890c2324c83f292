"""Figures with their intervals. One that is undefined is a value of its own: never nan, and never 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from align.ops.intervals import Interval, proportion_interval


@dataclass(frozen=True, slots=True)
class Undefined:
    """A figure that the data do not determine.

    Attributes:
        reason: in words, as in "undefined (unanimous)".
    """

    reason: str

    def __str__(self) -> str:
        return f"undefined ({self.reason})"


Figure = Interval | Undefined

NOTHING = Undefined("nothing to count")
ONE_SIDED = Undefined("always the same side")


def share(successes: Sequence[int], trials: Sequence[int]) -> Figure:
    """Compute the share of all trials that succeeded, with Wilson's interval at the effective number of observations.

    The trials come in clusters, such as the pairs of one ranking, within which they may depend on each other: a cluster
    is one observation, which counts for as much as it has trials; see `align.ops.intervals.proportion_interval`.

    Args:
        successes: one number a cluster, from 0 to its trials.
        trials: one number a cluster; a cluster without any does not count.
    """
    counted = [(x / m, m) for x, m in zip(successes, trials, strict=True) if m]
    return proportion_interval([share for share, _ in counted], [m for _, m in counted]) if counted else NOTHING


def log_odds(of: Figure) -> Figure:
    """Turn a share into log-odds, ln(p / (1−p)): 0 is even, and the interval's ends are taken along."""
    if isinstance(of, Undefined):
        return of
    if of.low is None or of.high is None or not 0 < of.value < 1:
        return ONE_SIDED
    value, low, high = (math.log(p / (1 - p)) for p in (of.value, of.low, of.high))
    return Interval(value, low, high, of.n)


def as_json(value: Any) -> Any:
    """Turn records into JSON objects, to any depth; what is undefined says so in words."""
    if isinstance(value, Undefined):
        return str(value)
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value
