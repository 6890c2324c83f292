"""Which measure of length leaves least of a judge's taste in the win rate of equals.

Each measure is fitted to the exact chances of judges with six tastes over 60,000 pairs of lengths of five kinds: what
is left beside ½ is its bias, without noise. `coverage.py` prints and saves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from simulated import JUDGES, Floats, lengths

from align.evals.stats import RIDGE, fitted, probability

PAIRS = 60_000
TASTES = JUDGES | {
    "steep": lambda d, r: 0.5 + 0.45 * np.tanh(d / 50),
    "far apart only": lambda d, r: np.where(np.abs(d) < 100, 0.5, np.where(d > 0, 0.85, 0.15)),
}
WORST = 0.015
"""Bar of the measure that is used."""


def pairs() -> Iterator[tuple[Floats, Floats]]:
    draw = np.random.default_rng(0)
    yield lengths(draw, PAIRS, 0.5)
    yield lengths(draw, PAIRS, 0.3)
    capped = (np.minimum(256, np.exp(draw.normal(more, 0.8, PAIRS)).round()) for more in (5.1, 4.6))
    yield next(capped) + 1, next(capped) + 1
    yield draw.integers(60, 420, PAIRS).astype(float), draw.integers(10, 350, PAIRS).astype(float)
    yield draw.gamma(2, 110, PAIRS).round() + 1, draw.gamma(2, 75, PAIRS).round() + 1


def measured(first: Floats, second: Floats) -> dict[str, list[Floats]]:
    """The columns of each measure; `align.evals.stats` has the third."""
    difference, ratio = first - second, np.log1p(first) - np.log1p(second)
    d, r = difference / difference.std(), ratio / ratio.std()
    return {
        "tanh of difference": [np.tanh(d)], "tanh of log ratio": [np.tanh(r)], "arctan of log ratio": [np.arctan(r)],
        "log ratio": [r], "difference": [d], "tanh of difference and of log ratio": [np.tanh(d), np.tanh(r)],
    }  # fmt: skip


def measures() -> Iterator[dict[str, Any]]:
    """The root mean square and the worst of each measure's bias."""
    left: dict[str, list[float]] = {}
    for first, second in pairs():
        columns = measured(first, second)
        for taste in TASTES.values():
            chances = taste(first - second, np.log(first / second))
            for name, terms in columns.items():
                x, ridge = np.column_stack([np.ones(PAIRS), *terms]), np.array([0.0] + [RIDGE] * len(terms))
                fit = fitted(x, chances, np.ones(PAIRS), np.arange(PAIRS), ridge)
                left.setdefault(name, []).append(float(probability(fit.coefficients)[0]) - 0.5)
    for name, bias in left.items():
        rms, worst = math.sqrt(float(np.mean(np.square(bias)))), float(np.abs(bias).max())
        yield {"name": name, "rms": rms, "worst": worst, "holds": name != "arctan of log ratio" or worst <= WORST}
