"""The strengths of many systems from verdicts on pairs of them. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.core.errors import InputError
from align.evals.stats.logistic import fitted, variance
from align.evals.stats.observed import Clusters, columns, places, within
from align.ops.intervals import Interval, t_quantile

RIDGE = 0.1
"""On each strength, as a normal prior of standard deviation 3.2 log-odds: it bounds a system that wins or loses all."""


@dataclass(frozen=True, slots=True)
class Strengths:
    """How strong each system is.

    Attributes:
        systems: names, the strongest first.
        strengths: log-odds against an average of these systems, which sum to 0; n counts the clusters that a system
            was judged in. A system that won or lost all has what the prior leaves, and a wide interval.
        verdicts: how many there are.
    """

    systems: tuple[str, ...]
    strengths: tuple[Interval, ...]
    verdicts: int

    def as_dict(self) -> dict[str, Any]:
        """Each system's strength by its name, the strongest first."""
        named = zip(self.systems, self.strengths, strict=True)
        return {"strengths": {name: one.as_dict() for name, one in named}, "verdicts": self.verdicts}


def bradley_terry(
    first: Sequence[str],
    second: Sequence[str],
    verdicts: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> Strengths:
    """Fit P(a beats b) = 1/(1 + e^−(θ_a − θ_b)), a tie being half a win for each, with intervals over clusters.

    Of each pair of systems a cluster counts once. A prior (`RIDGE`) draws strengths to 0, which makes them sum to 0.
    Intervals are θ ± t·se with the variance over clusters; `logistic.variance` widens it where few verdicts tell it. A
    single cluster has none.

    Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs".

    Args:
        first, second: names of the two systems of each verdict.
        verdicts: 1 for the first, 0 for the second, ½ for a tie, shape [n].
        clusters: the prompt of each verdict.

    Raises:
        InputError: parts of the systems were never compared with each other; it names the parts.
        ValueError: no verdicts, one that is outside [0, 1] or not finite, a system beside itself, or numbers of rows
            that differ.
    """
    (y,) = columns(verdicts=verdicts)
    within(0, 1, verdicts=y)
    if not len(first) == len(second) == y.size:
        raise ValueError(f"{len(first)} first and {len(second)} second systems for {y.size} verdicts")
    names = sorted({*first, *second})
    place = {name: k for k, name in enumerate(names)}
    a, b = (np.array([place[name] for name in side]) for side in (first, second))
    if (a == b).any():
        raise ValueError(f"{first[int(np.flatnonzero(a == b)[0])]!r} is compared with itself")
    _require_one_part(names, a, b)
    at, rows = places(clusters, y.size), np.arange(y.size)
    pair = np.minimum(a, b) * len(names) + np.maximum(a, b)  # of each pair a cluster counts once
    _, which, sizes = np.unique(at * len(names) ** 2 + pair, return_inverse=True, return_counts=True)
    x = np.zeros((y.size, len(names)))
    x[rows, a], x[rows, b] = 1.0, -1.0
    fit = fitted(x, y, 1 / sizes[which], at, np.full(len(names), RIDGE))
    centre = np.eye(len(names)) - 1 / len(names)  # strengths sum to 0, and vary only so far as that allows
    model, sandwich = (np.diag(centre @ covariance @ centre) for covariance in (fit.model, fit.sandwich))
    count = int(at.max()) + 1
    found = []
    for k, name in enumerate(names):
        theta, judged = float(fit.coefficients[k]), len(np.unique(at[(a == k) | (b == k)]))
        half = t_quantile(count - 1, level) * variance(sandwich[k], model[k]) ** 0.5 if count > 1 else None
        ends = (None, None) if half is None else (theta - half, theta + half)
        found.append((name, Interval(theta, *ends, judged)))
    found.sort(key=lambda one: -one[1].value)
    return Strengths(tuple(name for name, _ in found), tuple(one for _, one in found), y.size)


def _require_one_part(names: Sequence[str], a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
    """Raise InputError unless every system is compared with every other, if by way of others."""
    part = np.arange(len(names))
    for one, other in {*zip(a.tolist(), b.tolist(), strict=True)}:
        part[part == part[other]] = part[one]
    if len(found := np.unique(part)) > 1:
        parts = [", ".join(name for name, of in zip(names, part, strict=True) if of == one) for one in found]
        raise InputError(
            "systems",
            " | ".join(parts),
            "no verdict compares a system of one part with a system of another, so that their strengths have no common"
            " scale",
            "Compare at least one system of each part with one of the others, or rank each part by itself.",
        )
