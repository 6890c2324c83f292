"""Figures with their intervals. One that is undefined is a value of its own: never nan, and never 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from align.report import wilson_interval


@dataclass(frozen=True, slots=True)
class Undefined:
    """A figure that the data do not determine.

    Attributes:
        reason: in words, as in "undefined (unanimous)".
    """

    reason: str

    def __str__(self) -> str:
        return f"undefined ({self.reason})"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and where it plausibly lies.

    Attributes:
        value: the estimate.
        low, high: the ends of its 95 % interval; None where the data bear none.
        n: what it was taken over: pairs of candidates for a share, items for an alpha.
    """

    value: float
    low: float | None
    high: float | None
    n: int


Figure = Estimate | Undefined

NOTHING = Undefined("nothing to count")
ONE_SIDED = Undefined("always the same side")


def share(successes: Sequence[int], trials: Sequence[int]) -> Figure:
    """The share of all trials that succeeded, with Wilson's interval at the effective number of trials.

    The trials come in clusters, such as the pairs of one ranking, within which they may depend on each other. With G
    clusters of m_g trials, x_g of which succeeded, M = Σ m and p = Σ x / M, the design effect

        deff = [G/(G−1) · Σ (x_g − p·m_g)² / M²] / [p(1−p) / (M−1)]

    is the variance of p over clusters, by that of M independent trials, and the effective number is M / max(deff, 1).
    Where each cluster is one trial deff is 1, and this is Wilson's interval of G trials. Where deff cannot be told, for
    there is one cluster or p is 0 or 1, each cluster counts as one trial.
    Source: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data" (the effective number); Franco, Little, Louis and Slud 2019, "Comparative study of
    confidence intervals for proportions in complex sample surveys" (Wilson's interval with it).

    Args:
        successes: one number a cluster, from 0 to its trials.
        trials: one number a cluster; a cluster without any does not count.
    """
    clusters = [(x, m) for x, m in zip(successes, trials, strict=True) if m]
    total, groups = sum(m for _, m in clusters), len(clusters)
    if not total:
        return NOTHING
    p = sum(x for x, _ in clusters) / total
    effective = float(groups)
    if groups > 1 and 0 < p < 1:
        between = groups / (groups - 1) * sum((x - p * m) ** 2 for x, m in clusters) / total**2
        effective = total / max(1.0, between * (total - 1) / (p * (1 - p)))
    low, high = wilson_interval(p * effective, effective)
    return Estimate(p, low, high, total)


def log_odds(of: Figure) -> Figure:
    """A share as log-odds, ln(p / (1−p)): 0 is even, and the interval's ends are taken along."""
    if isinstance(of, Undefined):
        return of
    if of.low is None or of.high is None or not 0 < of.value < 1:
        return ONE_SIDED
    value, low, high = (math.log(p / (1 - p)) for p in (of.value, of.low, of.high))
    return Estimate(value, low, high, of.n)


def as_json(value: Any) -> Any:
    """Records as JSON objects, to any depth; what is undefined says so in words."""
    if isinstance(value, Undefined):
        return str(value)
    if is_dataclass(value):
        return {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return value
