"""Intervals for what an evaluation claims.

The unit is the prompt: two answers to one prompt are not two pieces of evidence, so prompts are what is resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.report import wilson_interval

Statistic = Callable[..., Any]
"""Reduces one axis of an array, called as `statistic(array, axis=-1)`: `np.mean`, `np.median`, …"""

RESAMPLED_ELEMENTS = 1 << 22
"""Resampled values held at once (32 MB of float64): ten thousand resamples of a large set would not fit."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and where it plausibly lies.

    Attributes:
        value: the estimate.
        low, high: the ends of its interval.
        n: independent observations (prompts) behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """The `{value, low, high, n}` of `metrics.json`."""
        return asdict(self)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike | None = None,
    *,
    seed: int,
    statistic: Statistic = np.mean,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of a statistic of per-prompt differences.

    Resampling the *differences* keeps each prompt's two answers together, so how hard a prompt is cancels out.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; paired use as in Koehn 2004.

    Args:
        a: one number a prompt, shape [n].
        b: the other system's number for the same prompts, shape [n]; without it `a` holds the differences (or any
            figure that is already one number a prompt, such as 1/½/0 wins).
        seed: the interval is a function of it and the data, nothing else.
        statistic: of the differences `a - b`, reducing one axis.

    Raises:
        ValueError: no prompts, shapes that differ, or a value that is not finite.
    """
    first = np.asarray(a, dtype=np.float64)
    differences = first if b is None else first - _same_shape(first, np.asarray(b, dtype=np.float64))
    if differences.ndim != 1 or differences.size == 0:
        raise ValueError(f"expected one number a prompt and at least one prompt, got shape {differences.shape}")
    if not np.isfinite(differences).all():
        raise ValueError(f"prompt {int(np.flatnonzero(~np.isfinite(differences))[0])} has a value that is not finite")
    if not 0 < level < 1:
        raise ValueError(f"level={level} is not between 0 and 1")

    n = differences.size
    generator = np.random.default_rng(seed)
    rows = max(1, RESAMPLED_ELEMENTS // n)
    draws = [
        statistic(differences[generator.integers(0, n, size=(min(rows, resamples - start), n))], axis=-1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(differences, axis=-1)), float(low), float(high), n)


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Share of `n` with Wilson's score interval; the formula is `align.report.wilson_interval`, which also draws it."""
    low, high = wilson_interval(successes, n, level)
    return Interval(successes / n, low, high, n)


def win_rate(gold_policy: ArrayLike, gold_ref: ArrayLike) -> NDArray[np.float64]:
    """Per prompt 1 where the policy's answer scored higher, 0 where lower, ½ where exactly equal; shape [n].

    The mean is the win rate, ties counted as half, so that a policy compared with itself wins exactly ½.
    """
    policy = np.asarray(gold_policy, dtype=np.float64)
    ref = _same_shape(policy, np.asarray(gold_ref, dtype=np.float64))
    if np.isnan(policy).any() or np.isnan(ref).any():
        raise ValueError("a score is NaN: it neither wins nor loses")
    return np.where(policy > ref, 1.0, np.where(policy < ref, 0.0, 0.5))


def per_prompt(prompt_ids: Sequence[str], values: ArrayLike) -> NDArray[np.float64]:
    """Mean of each prompt's values, in order of first appearance: shape [answers] to [prompts]."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt_ids))}
    place = np.array([index[p] for p in prompt_ids], dtype=np.int64)
    totals = np.bincount(place, weights=np.asarray(values, dtype=np.float64), minlength=len(index))
    return totals / np.bincount(place, minlength=len(index))


def _same_shape(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ: one number a prompt is expected from each")
    return b
