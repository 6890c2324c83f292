"""Bradley-Terry strengths of several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.core.errors import InputError
from align.evals.stats.columns import Clusters, number_clusters, require_within, to_columns
from align.evals.stats.logistic import RIDGE, fit_logistic, shrink_variance
from align.ops.intervals import Interval, t_quantile


@dataclass(frozen=True, slots=True)
class Strengths:
    """Bradley-Terry strengths of several models, with intervals.

    Attributes:
        systems: names, the strongest first.
        strengths: log-odds against an average of these systems, which sum to 0; n counts the clusters in which a system
            was judged. A system that won or lost every comparison has a strength bounded by the prior, and a wide
            interval.
        verdicts: number of verdicts.
    """

    systems: tuple[str, ...]
    strengths: tuple[Interval, ...]
    verdicts: int

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object `strengths`, model name → interval with the strongest first, and `verdicts`, the
        number of verdicts."""
        pairs = zip(self.systems, self.strengths, strict=True)
        return {"strengths": {name: strength.as_dict() for name, strength in pairs}, "verdicts": self.verdicts}


def fit_bradley_terry(
    first: Sequence[str],
    second: Sequence[str],
    verdicts: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
) -> Strengths:
    """Fit the Bradley-Terry strength of each model to pairwise verdicts, with intervals over clusters. P(a beats b) =
    1/(1 + e^−(θ_a − θ_b)), and a tie is half a win for each.

    For each pair of systems a cluster counts once. A prior (`RIDGE`) shrinks strengths towards 0, so that they sum to
    0. Intervals are θ ± t·se with the variance over clusters, which `shrink_variance` widens if there are few
    verdicts. With a single cluster there is no interval.

    Source: Bradley and Terry 1952, "Rank analysis of incomplete block designs".

    Args:
        first, second: names of the two systems of each verdict.
        verdicts: 1 for the first, 0 for the second, ½ for a tie, shape [n].
        clusters: the prompt of each verdict.

    Raises:
        InputError: some systems are connected by no chain of comparisons. The message names the groups.
        ValueError: there are no verdicts, one is outside [0, 1] or not finite, a system is compared with itself, or the
            numbers of rows differ.
    """
    (y,) = to_columns(verdicts=verdicts)
    require_within(0, 1, verdicts=y)
    if not len(first) == len(second) == y.size:
        raise ValueError(f"{len(first)} first and {len(second)} second systems for {y.size} verdicts")
    names = sorted({*first, *second})
    number_of_name = {name: k for k, name in enumerate(names)}
    first_numbers, second_numbers = (np.array([number_of_name[name] for name in side]) for side in (first, second))
    if (first_numbers == second_numbers).any():
        raise ValueError(f"{first[int(np.flatnonzero(first_numbers == second_numbers)[0])]!r} is compared with itself")
    _require_connected(names, first_numbers, second_numbers)
    cluster_numbers = number_clusters(clusters, y.size)
    rows = np.arange(y.size)
    low_numbers = np.minimum(first_numbers, second_numbers)
    high_numbers = np.maximum(first_numbers, second_numbers)
    pair = low_numbers * len(names) + high_numbers  # a cluster counts once for each unordered pair
    _, pair_numbers, sizes = np.unique(
        cluster_numbers * len(names) ** 2 + pair, return_inverse=True, return_counts=True
    )
    x = np.zeros((y.size, len(names)))
    x[rows, first_numbers] = 1.0
    x[rows, second_numbers] = -1.0
    fit = fit_logistic(x, y, 1 / sizes[pair_numbers], cluster_numbers, np.full(len(names), RIDGE))
    centre = np.eye(len(names)) - 1 / len(names)  # strengths sum to 0, and vary only so far as that allows
    model, sandwich = (np.diag(centre @ covariance @ centre) for covariance in (fit.model, fit.sandwich))
    cluster_total = int(cluster_numbers.max()) + 1
    strengths = []
    for k, name in enumerate(names):
        theta = float(fit.coefficients[k])
        cluster_count = len(np.unique(cluster_numbers[(first_numbers == k) | (second_numbers == k)]))
        half_width = (
            t_quantile(cluster_total - 1, level) * shrink_variance(sandwich[k], model[k]) ** 0.5
            if cluster_total > 1
            else None
        )
        ends = (None, None) if half_width is None else (theta - half_width, theta + half_width)
        strengths.append((name, Interval(theta, *ends, cluster_count)))
    strengths.sort(key=lambda entry: -entry[1].value)
    return Strengths(tuple(name for name, _ in strengths), tuple(strength for _, strength in strengths), y.size)


def _require_connected(names: Sequence[str], first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
    """Raise InputError unless a chain of comparisons connects every model to every other."""
    group_of = np.arange(len(names))
    for i, j in {*zip(first.tolist(), second.tolist(), strict=True)}:
        group_of[group_of == group_of[j]] = group_of[i]
    groups = np.unique(group_of)
    if len(groups) > 1:
        members = [
            ", ".join(name for name, own_group in zip(names, group_of, strict=True) if own_group == group)
            for group in groups
        ]
        raise InputError(
            "systems",
            " | ".join(members),
            "no verdict compares a system of one part with a system of another, so that their strengths have no common"
            " scale",
            "Compare at least one system of each part with one of the others, or rank each part by itself.",
        )
