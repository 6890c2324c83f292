"""Best-of-n estimates from N answers, compared with the mean over every subset of n."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from align.ops.best_of_n import (
    compute_best_probabilities,
    compute_kl_bound,
    estimate_best_of_n,
    list_sizes,
    rank_answers,
)

SCORES = [
    [0.3, -1.0, 2.0, 0.5, 0.1, 7.0, -3.0],
    [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0],  # ties: the first drawn wins
    [2.0] * 7,
]
VALUES = [
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
    [3.0, -1.0, 4.0, -1.0, 5.0, -9.0, 2.0],
    [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
]


def average_over_subsets(scores: list[float], values: list[float], n: int) -> float:
    """Compute the mean value of the best of n answers by its definition."""
    subsets = [*combinations(range(len(scores)), n)]
    winners = [max(subset, key=lambda i: (scores[i], -i)) for subset in subsets]
    return sum(values[i] for i in winners) / len(subsets)


@pytest.mark.parametrize("n", range(1, 8))
def test_it_is_the_mean_over_all_subsets(n: int) -> None:
    expected = [average_over_subsets(s, v, n) for s, v in zip(SCORES, VALUES, strict=True)]
    np.testing.assert_allclose(estimate_best_of_n(SCORES, VALUES, n), expected, rtol=1e-13)
    expected_scores = [average_over_subsets(s, s, n) for s in SCORES]
    np.testing.assert_allclose(estimate_best_of_n(SCORES, SCORES, n), expected_scores, rtol=1e-13)


def test_one_is_the_mean_and_all_is_the_winner() -> None:
    np.testing.assert_allclose(estimate_best_of_n(SCORES, VALUES, 1), np.mean(VALUES, axis=1))
    assert estimate_best_of_n(SCORES, VALUES, 7).tolist() == [32.0, 3.0, 7.0]
    assert rank_answers(SCORES)[:, 0].tolist() == [5, 0, 0]
    assert rank_answers(SCORES)[1].tolist() == [0, 1, 3, 6, 2, 4, 5]
    assert rank_answers([[1.0, 0.0] * 100])[0].tolist() == [*range(0, 200, 2), *range(1, 200, 2)]


@pytest.mark.parametrize(("n", "of"), [(1, 1), (3, 5), (64, 64), (300, 4096)])
def test_chances_sum_to_one_however_large(n: int, of: int) -> None:
    chances = compute_best_probabilities(n, of)
    assert chances.sum() == pytest.approx(1.0, abs=1e-12)
    assert (chances[: n - 1] == 0).all()
    assert (np.diff(chances) >= 0).all()


@pytest.mark.parametrize(("n", "of"), [(0, 4), (5, 4)])
def test_more_than_there_are_is_refused(n: int, of: int) -> None:
    with pytest.raises(ValueError, match=f"n={n} is not from 1 to 4"):
        compute_best_probabilities(n, of)


def test_sizes_and_the_bound_of_kl() -> None:
    assert (list_sizes(2), list_sizes(8), list_sizes(12)) == ([1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12])
    assert compute_kl_bound(1) == 0.0
    assert compute_kl_bound(2) == pytest.approx(0.1931471805599453)
    # Continuous scores reach the bound: the winner's density relative to the policy's is n·u^(n−1) at quantile u.
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    assert compute_kl_bound(16) == pytest.approx(float(np.mean(16 * u**15 * np.log(16 * u**15))), abs=1e-6)
    assert compute_kl_bound(64) == pytest.approx(math.log(64) - 63 / 64)
