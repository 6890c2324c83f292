"""Figures with their intervals. An undefined figure is a value of its own, never nan and never 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from align.ops.intervals import Interval, proportion_interval


@dataclass(frozen=True, slots=True)
class Undefined:
    """A figure that cannot be computed from the data, with the reason.

    Attributes:
        reason: shown as in "undefined (unanimous)".
    """

    reason: str

    def __str__(self) -> str:
        return f"undefined ({self.reason})"


Figure = Interval | Undefined

NOTHING_COUNTED = Undefined("nothing to count")
ONE_SIDED = Undefined("always the same side")


def compute_share(successes: Sequence[int], trials: Sequence[int]) -> Figure:
    """Compute the share of successes in clustered trials, with Wilson's interval at the effective number of clusters.

    The trials come in clusters, such as the pairs of one ranking, within which they may depend on each other. A cluster
    is one observation, weighted by its number of trials; see `align.ops.intervals.proportion_interval`.

    Args:
        successes: one number per cluster, from 0 to its trials.
        trials: one number per cluster; a cluster without trials does not count.
    """
    clusters = [(x / m, m) for x, m in zip(successes, trials, strict=True) if m]
    if not clusters:
        return NOTHING_COUNTED
    return proportion_interval([proportion for proportion, _ in clusters], [m for _, m in clusters])


def to_log_odds(proportion: Figure) -> Figure:
    """Convert a share and its interval to log-odds, ln(p / (1−p)), where 0 means even odds.

    Returns Undefined if the share is 0 or 1, has no interval or is undefined itself.
    """
    if isinstance(proportion, Undefined):
        return proportion
    if proportion.low is None or proportion.high is None or not 0 < proportion.value < 1:
        return ONE_SIDED
    value, low, high = (math.log(p / (1 - p)) for p in (proportion.value, proportion.low, proportion.high))
    return Interval(value, low, high, proportion.n)


def as_json(value: Any) -> Any:
    """Convert dataclasses, mappings and sequences recursively to JSON values. An undefined figure becomes its text."""
    if isinstance(value, Undefined):
        return str(value)
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_json(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(element) for element in value]
    return value
