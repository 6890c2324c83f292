"""The Davidson-Luce model of rankings agrees with its formula, with choix, with finite differences, and with draws."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import choix
import numpy as np
import pytest

from align.ops.rankings import (
    Derivatives,
    build_choices,
    compute_log_likelihoods,
    differentiate_by_coefficients,
    differentiate_by_utilities,
    draw_rankings,
    list_subsets,
)

WITHOUT_TIES = -40.0
"""A ln ν with which ties have no probability in double precision."""


def list_rankings(k: int) -> np.ndarray:
    """Return the tiers of all rankings of K answers with ties: numbers from 0 on, of which none is left out."""
    tiers = np.array(list(product(range(k), repeat=k)))
    return tiers[[sorted(set(row)) == list(range(max(row) + 1)) for row in tiers.tolist()]]


@pytest.mark.parametrize(("k", "count"), [(1, 1), (2, 3), (3, 13), (4, 75)])
def test_the_probabilities_of_all_rankings_sum_to_one(k: int, count: int):
    tiers = list_rankings(k)
    assert len(tiers) == count
    utilities = np.random.default_rng(k).normal(size=(2, k))
    log_likelihoods = compute_log_likelihoods(
        build_choices(tiers), np.tile(utilities, (count, 1, 1)), np.full(count, -0.3)
    )
    assert np.exp(log_likelihoods).sum(axis=0) == pytest.approx(1)


def test_two_answers_follow_davidson():
    first, second, nu = np.exp(0.7), np.exp(-0.4), 0.6
    tie = nu * np.sqrt(first * second)
    expected = np.log(np.array([first, second, tie]) / (first + second + tie))
    utilities = np.tile([0.7, -0.4], (3, 1, 1))
    choices = build_choices(np.array([[0, 1], [1, 0], [0, 0]]))
    assert compute_log_likelihoods(choices, utilities, np.full(3, np.log(nu)))[:, 0] == pytest.approx(expected)


def test_rankings_without_ties_have_the_mode_that_choix_finds():
    # Its penalty alpha·|θ|² is that of a normal prior with the variance 1 / (2·alpha).
    random = np.random.default_rng(0)
    orders = np.array([random.permutation(5) for _ in range(30)])
    mode = choix.opt_rankings(5, orders.tolist(), alpha=0.5, method="Newton-CG", tol=1e-9)
    utilities = np.tile(mode, (30, 1, 1))
    derivatives = differentiate_by_utilities(
        build_choices(np.argsort(orders, axis=1)), utilities, np.full(30, WITHOUT_TIES)
    )
    assert derivatives.gradient_NP.sum(axis=0) == pytest.approx(mode, abs=1e-4)


def differentiate_numerically(evaluate: Callable[[np.ndarray], np.ndarray], point: np.ndarray) -> np.ndarray:
    step = 1e-5
    directions = step * np.eye(len(point))
    return np.stack([evaluate(point + d) - evaluate(point - d) for d in directions], axis=-1) / (2 * step)


def test_derivatives_by_utilities_are_those_of_finite_differences():
    random = np.random.default_rng(1)
    tiers = list_rankings(4)[::5]
    choices = build_choices(tiers)
    log_nu = np.full(len(tiers), -0.3)
    offsets = random.normal(size=(3, 4))

    def build_utilities(point: np.ndarray) -> np.ndarray:
        return np.tile(point + offsets, (len(tiers), 1, 1))

    def evaluate(point: np.ndarray) -> np.ndarray:
        return compute_log_likelihoods(choices, build_utilities(point), log_nu).mean(axis=1)

    def differentiate(point: np.ndarray) -> Derivatives:
        return differentiate_by_utilities(choices, build_utilities(point), log_nu)

    point = random.normal(size=4)
    gradient, information = differentiate(point)
    assert gradient == pytest.approx(differentiate_numerically(evaluate, point), abs=1e-6)
    hessian = differentiate_numerically(lambda point: differentiate(point).gradient_NP, point)
    assert information == pytest.approx(-hessian, abs=1e-6)


def test_derivatives_by_coefficients_are_those_of_finite_differences():
    random = np.random.default_rng(2)
    tiers = list_rankings(4)[::5]
    choices = build_choices(tiers)
    means, extra = list_subsets(4)
    strengths = random.normal(size=(len(tiers), 3, 4))
    places = random.normal(size=(len(tiers), 4))
    features = (strengths @ means.T, (places @ means.T)[:, None, :], extra)

    def evaluate(point: np.ndarray) -> np.ndarray:
        utilities = point[0] * strengths + point[1] * places[:, None, :]
        return compute_log_likelihoods(choices, utilities, np.full(len(tiers), point[2])).mean(axis=1)

    def differentiate(point: np.ndarray) -> Derivatives:
        scores = sum(value * feature for value, feature in zip(point, features, strict=True))
        return differentiate_by_coefficients(choices, scores, features)

    point = random.normal(size=3)
    gradient, information = differentiate(point)
    assert gradient == pytest.approx(differentiate_numerically(evaluate, point), abs=1e-6)
    hessian = differentiate_numerically(lambda point: differentiate(point).gradient_NP, point)
    assert information == pytest.approx(-hessian, abs=1e-6)


def test_draws_have_the_probabilities_of_the_model():
    tiers = list_rankings(3)
    utilities = np.array([0.8, 0.0, -0.5])
    log_nu = -0.5
    expected = np.exp(
        compute_log_likelihoods(build_choices(tiers), np.tile(utilities, (13, 1, 1)), np.full(13, log_nu))[:, 0]
    )
    count = 20_000
    drawn = draw_rankings(np.random.default_rng(2), np.tile(utilities, (count, 1)), np.full(count, log_nu))
    shares = np.array([(drawn == row).all(axis=1).mean() for row in tiers])
    assert shares == pytest.approx(expected, abs=4 * np.sqrt(0.25 / count))
    assert shares.sum() == 1
