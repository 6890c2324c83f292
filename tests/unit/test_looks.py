"""Several looks at growing data: published boundaries, and errors over simulated paths."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.ops.intervals import normal_quantile
from align.ops.looks import (
    compute_boundary_quantile,
    compute_sequence_quantile,
    compute_spent_error,
    quantile_to_level,
)

TABLE = {1: (1.9600,), 2: (2.9626, 1.9686), 5: (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)}
"""One-sided boundaries at error 0.025 and equally spaced looks, as tables of the Lan-DeMets method print them."""


@pytest.mark.parametrize("looks", TABLE)
def test_boundaries_are_the_published_ones(looks: int) -> None:
    counts = [60 * (k + 1) // looks for k in range(looks)]
    quantiles = [compute_boundary_quantile(counts[: k + 1], 60) for k in range(looks)]
    assert quantiles == pytest.approx(TABLE[looks], abs=2e-4)


def simulate_paths(counts: np.ndarray, draws: int) -> np.ndarray:
    """Return z statistics of equal systems at growing numbers of observations, shape [draws, looks]."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(draws, counts.size)) * np.sqrt(np.diff(counts, prepend=0))
    return steps.cumsum(axis=1) / np.sqrt(counts)


@pytest.mark.parametrize("counts", [[50, 100, 150, 200], [10, 15, 170, 200], [199, 200], [30, 60, 120], [190, 1000]])
def test_all_looks_together_err_no_more_than_one(counts: list[int]) -> None:
    """Looks that end before the planned number leave some of the error unspent. The last look may exceed it."""
    quantiles = [compute_boundary_quantile(counts[: k + 1], 200) for k in range(len(counts))]
    draws = 200_000
    share = float((simulate_paths(np.array(counts), draws) > np.array(quantiles)).any(axis=1).mean())
    expected = compute_spent_error(counts[-1] / 200, 0.025)
    assert share == pytest.approx(expected, abs=4 * math.sqrt(0.025 / draws))


def test_a_confidence_sequence_may_be_looked_at_always() -> None:
    counts = np.arange(20, 4001, 20)
    quantiles = np.array([compute_sequence_quantile(n, 100) for n in counts.tolist()])
    paths = simulate_paths(counts, 5000)
    assert (paths > quantiles).any(axis=1).mean() <= 0.027
    assert (paths > normal_quantile(0.95)).any(axis=1).mean() > 0.15, "the usual intervals err"
    widths = quantiles / np.sqrt(counts)
    assert (np.diff(widths) < 0).all()


def test_a_confidence_sequence_is_narrowest_at_the_given_number() -> None:
    at_100 = [compute_sequence_quantile(100, tightest_n) for tightest_n in (10, 100, 1000)]
    assert at_100[1] == min(at_100)


def test_levels_and_quantiles() -> None:
    for level in (0.8, 0.95, 0.999):
        assert quantile_to_level(normal_quantile(level)) == pytest.approx(level)
    assert compute_boundary_quantile([30], 30, 0.9) == pytest.approx(normal_quantile(0.9), abs=1e-6)


@pytest.mark.parametrize("looks", [[], [0, 5], [5, 5], [9, 4], [100, 120], [120, 130]])
def test_invalid_looks_are_refused(looks: list[int]) -> None:
    with pytest.raises(ValueError, match="looks="):
        compute_boundary_quantile(looks, 100)
