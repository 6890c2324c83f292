"""Critical values for repeated tests on accumulating data, which keep the total error at that of one test.

A *look* is one analysis of the data so far. Testing ends at the first look whose interval excludes the bound. Repeated
looks at the usual 95 % intervals of two equal systems find one of them better in far more than 2.5 % of cases. The
functions here return a larger quantile for each look. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

GRID_POINTS = 801
"""Least number of points of the grid on which the density of the statistic is integrated."""
MAX_GRID_POINTS = 6_001
DEVIATIONS = 8.0
"""Half width of the grid in standard deviations."""
MAX_QUANTILE = 6.0
"""Upper limit of the returned quantiles. A standard normal variable exceeds it with probability 10⁻⁹."""


def quantile_to_level(quantile: float) -> float:
    """Return the level of the two-sided normal interval with a quantile: 0.95 for 1.96."""
    return math.erf(quantile / math.sqrt(2))


def compute_spent_error(fraction: float, error: float) -> float:
    """Return the cumulative one-sided error that is spent at an information fraction t, by the spending function of
    O'Brien and Fleming's type: 2 − 2Φ(z / √t), where z is the normal quantile of 1 − error/2.

    Source: Lan and DeMets 1983, "Discrete sequential boundaries for clinical trials".

    Args:
        fraction: share of the planned observations that were seen. All of the error is spent at 1.
        error: of one side, such as 0.025.
    """
    if fraction >= 1:
        return error
    return math.erfc(NormalDist().inv_cdf(1 - error / 2) / math.sqrt(2 * fraction))


def compute_boundary_quantile(looks: Sequence[int], max_n: int, level: float = 0.95) -> float:
    """Return the two-sided quantile for the last of several looks. Up to `max_n` observations, all looks together
    reject a true bound on one side with probability (1 − level)/2; each spends error by `compute_spent_error`.

    The density of the statistic over the paths without an earlier rejection is integrated from look to look. The last
    look may have more than `max_n` observations.

    Source: Armitage, McPherson and Rowe 1969, "Repeated significance tests on accumulating data".

    Args:
        looks: numbers of observations at the looks so far, increasing, the present one last.
        max_n: planned number of observations at the last look.

    Raises:
        ValueError: the looks do not increase, go on after one at `max_n`, or there are none.
    """
    if not looks or min(looks) < 1 or [*looks] != sorted({*looks}):
        raise ValueError(f"looks={[*looks]} are not increasing numbers above 0")
    error = (1 - level) / 2
    if len(looks) > 1 and looks[-2] >= max_n:
        raise ValueError(f"looks={[*looks]} go on after max_n={max_n}")
    # The statistic is scaled as a Brownian motion: its variance at a look is the share of the planned observations.
    times = [n / max_n for n in looks]
    points = np.zeros(1)
    masses = np.ones(1)
    before = 0.0
    spent = 0.0
    boundary = math.inf
    for i, time in enumerate(times):
        step = math.sqrt(time - before)
        increment = compute_spent_error(time, error) - spent
        boundary = _find_boundary(points, masses, step, increment, MAX_QUANTILE * math.sqrt(time))
        if i == len(times) - 1:
            break
        # The grid is finer than the next step, however close the next look is.
        width = (DEVIATIONS + MAX_QUANTILE) * math.sqrt(time)
        needed = 2 * math.ceil(2 * width / math.sqrt(times[i + 1] - time)) + 1
        grid = np.linspace(-DEVIATIONS * math.sqrt(time), boundary, min(MAX_GRID_POINTS, max(GRID_POINTS, needed)))
        density = np.exp(-(((grid[:, None] - points) / step) ** 2) / 2) @ masses / (step * math.sqrt(2 * math.pi))
        masses = density * _weigh_simpson(grid)
        points = grid
        before = time
        spent += increment
    return boundary / math.sqrt(times[-1])


def _find_boundary(
    points: NDArray[np.float64], masses: NDArray[np.float64], step: float, error: float, highest: float
) -> float:
    """Return the value that the statistic exceeds after a normal step with probability `error`, from `points` with
    their probabilities."""

    def compute_exceedance(boundary: float) -> float:
        scaled = (boundary - points) / (step * math.sqrt(2))
        return float(masses @ np.array([math.erfc(value) for value in scaled.tolist()])) / 2

    low = 0.0
    high = highest
    for _ in range(50):
        middle = (low + high) / 2
        if compute_exceedance(middle) > error:
            low = middle
        else:
            high = middle
    return high


def _weigh_simpson(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.full(grid.size, 2.0)
    weights[1::2] = 4.0
    weights[[0, -1]] = 1.0
    return weights * (grid[1] - grid[0]) / 3


def compute_sequence_quantile(n: int, tightest_n: int, level: float = 0.95) -> float:
    """Return the two-sided quantile of a confidence sequence, whose intervals at all n together miss the truth with
    probability 1 − level. Any number of looks is allowed.

    It is √((nρ² + 1)/(nρ²) · ln((nρ² + 1)/α²)) with α = 1 − level, for which ρ² = (ln(1/α²) + ln ln(1/α²) + 1) / n₀
    makes the intervals narrowest at about n₀ observations.

    Sources: Robbins 1970, "Statistical methods related to the law of the iterated logarithm"; Waudby-Smith, Arbour,
    Sinha, Kennedy and Ramdas 2024, "Time-uniform central limit theory and asymptotic confidence sequences".

    Args:
        n: number of observations.
        tightest_n: n₀.
    """
    log_error = -2 * math.log(1 - level)
    scaled = n * (log_error + math.log(log_error) + 1) / tightest_n
    return min(MAX_QUANTILE, math.sqrt((scaled + 1) / scaled * (math.log(scaled + 1) + log_error)))
