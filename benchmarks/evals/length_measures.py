"""Compare measures of length by the bias that length control with them leaves in the win rate of equal systems.

Each measure is fitted to the exact win probabilities of judges with six length biases, over 60,000 pairs of lengths of
five kinds. The difference of the controlled win rate from ½ is the measure's bias, without sampling noise.
`coverage.py` prints and saves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from simulation import JUDGES, Floats, draw_lengths

from align.evals.stats.logistic import RIDGE, compute_sigmoid, fit_logistic

PAIRS = 60_000
LENGTH_BIASES = JUDGES | {
    "steep": lambda difference, log_ratio: 0.5 + 0.45 * np.tanh(difference / 50),
    "far apart only": lambda difference, log_ratio: np.where(
        np.abs(difference) < 100, 0.5, np.where(difference > 0, 0.85, 0.15)
    ),
}
USED_MEASURE = "arctan of log ratio"
"""The measure that `align.evals.stats.length_control` uses."""
MAX_BIAS = 0.015
"""Bar of the used measure."""


def iter_length_pairs() -> Iterator[tuple[Floats, Floats]]:
    """Yield the lengths of the first and the second answers, [PAIRS] each, of five kinds."""
    rng = np.random.default_rng(0)
    yield draw_lengths(rng, PAIRS, 0.5)
    yield draw_lengths(rng, PAIRS, 0.3)
    first, second = (np.minimum(256, np.exp(rng.normal(mean, 0.8, PAIRS)).round()) for mean in (5.1, 4.6))
    yield first + 1, second + 1
    yield rng.integers(60, 420, PAIRS).astype(float), rng.integers(10, 350, PAIRS).astype(float)
    yield rng.gamma(2, 110, PAIRS).round() + 1, rng.gamma(2, 75, PAIRS).round() + 1


def compute_measures(first: Floats, second: Floats) -> dict[str, list[Floats]]:
    """Return the regression columns of each measure of two lengths."""
    difference = first - second
    log_ratio = np.log1p(first) - np.log1p(second)
    scaled_difference = difference / difference.std()
    scaled_ratio = log_ratio / log_ratio.std()
    return {
        "tanh of difference": [np.tanh(scaled_difference)],
        "tanh of log ratio": [np.tanh(scaled_ratio)],
        USED_MEASURE: [np.arctan(scaled_ratio)],
        "log ratio": [scaled_ratio],
        "difference": [scaled_difference],
        "tanh of difference and of log ratio": [np.tanh(scaled_difference), np.tanh(scaled_ratio)],
    }


def compute_measure_biases() -> Iterator[dict[str, Any]]:
    """Yield the root mean square and the largest absolute value of each measure's bias."""
    biases: dict[str, list[float]] = {}
    for first, second in iter_length_pairs():
        measures = compute_measures(first, second)
        for length_bias in LENGTH_BIASES.values():
            win_probability = length_bias(first - second, np.log(first / second))
            for name, columns in measures.items():
                design = np.column_stack([np.ones(PAIRS), *columns])
                ridge = np.array([0.0] + [RIDGE] * len(columns))
                fit = fit_logistic(design, win_probability, np.ones(PAIRS), np.arange(PAIRS), ridge)
                biases.setdefault(name, []).append(float(compute_sigmoid(fit.coefficients)[0]) - 0.5)
    for name, measure_biases in biases.items():
        rms = math.sqrt(float(np.mean(np.square(measure_biases))))
        worst = float(np.abs(measure_biases).max())
        yield {"name": name, "rms": rms, "worst": worst, "holds": name != USED_MEASURE or worst <= MAX_BIAS}
