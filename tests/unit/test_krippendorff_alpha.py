"""Krippendorff's alpha: published values, and the package krippendorff over generated tables."""

from __future__ import annotations

import math
from time import process_time

import krippendorff
import numpy as np
import pytest

from align.annotate.figures.agreement import (
    Level,
    build_coincidences,
    compute_alphas,
    count_ratings,
)

LEVELS: tuple[Level, ...] = ("nominal", "ordinal", "interval", "ratio")
NONE = math.nan

# Krippendorff 2011, section C: four observers and twelve units, the last with one rating.
PUBLISHED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]


def compute_alpha(ratings_RU: list[list[float]] | np.ndarray, level: Level) -> float:
    ratings = np.asarray(ratings_RU, dtype=np.float64)
    values_V = np.unique(ratings[~np.isnan(ratings)])
    return float(compute_alphas(build_coincidences(count_ratings(ratings, values_V))[None], values_V, level)[0])


@pytest.mark.parametrize(
    ("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)]
)
def test_the_published_values(level: Level, expected: float):
    assert compute_alpha(PUBLISHED, level) == pytest.approx(expected, abs=5e-4)


def generate_tables(seed: int, count: int) -> list[np.ndarray]:
    """Return tables of 2 to 8 raters, 3 to 40 units and 2 to 7 values, with up to 0.9 of the ratings missing."""
    rng = np.random.default_rng(seed)
    tables = []
    while len(tables) < count:
        raters = rng.integers(2, 9)
        units = rng.integers(3, 41)
        values = rng.integers(2, 8)
        domain = np.sort(rng.choice(np.arange(-3, 12) * rng.choice([0.5, 1.0, 3.0]), size=values, replace=False))
        truth_U = rng.choice(domain, size=units)
        ratings_RU = np.where(rng.random((raters, units)) < rng.random(), truth_U, rng.choice(domain, (raters, units)))
        ratings_RU[rng.random((raters, units)) < rng.uniform(0, 0.9)] = NONE
        rated = ratings_RU[:, (~np.isnan(ratings_RU)).sum(axis=0) > 1]
        if len(np.unique(rated[~np.isnan(rated)])) > 1:  # the package refuses other tables
            tables.append(ratings_RU)
    return tables


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_that_of_the_package(level: Level):
    tables = generate_tables(LEVELS.index(level), 300)
    assert sum(np.isnan(table).mean() > 0.5 for table in tables) > 50
    for ratings_RU in tables:
        # The ratio level requires values of at least zero: those of opposite sign may sum to a divisor of zero.
        table = np.abs(ratings_RU) if level == "ratio" else ratings_RU
        if len(np.unique(table[~np.isnan(table)])) < 2:
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            theirs = krippendorff.alpha(reliability_data=table, level_of_measurement=level)
        assert compute_alpha(table, level) == pytest.approx(theirs, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("level", LEVELS)
def test_it_is_undefined_without_two_different_paired_ratings(level: Level):
    assert math.isnan(compute_alpha([[1, 1, NONE], [1, 1, 2]], level))
    assert math.isnan(compute_alpha([[1, NONE], [NONE, 2]], level))
    assert math.isnan(compute_alpha([[NONE, NONE]], level))


def test_many_matrices_at_once_are_each_of_them_alone():
    tables = generate_tables(9, 20)
    values = np.unique(np.concatenate([table[~np.isnan(table)] for table in tables]))
    matrices = np.stack([build_coincidences(count_ratings(table, values)) for table in tables])
    together = compute_alphas(matrices, values, "ordinal")
    assert together == pytest.approx([compute_alpha(table, "ordinal") for table in tables], abs=1e-12)


def test_it_takes_no_longer_than_the_package():
    rng = np.random.default_rng(0)
    counts_UV = rng.multinomial(4, np.ones(7) / 7, size=20_000)
    values = np.arange(7)

    def measure_best_time(compute, repeats: int = 3) -> float:
        times = []
        for _ in range(repeats):
            began = process_time()
            compute()
            times.append(process_time() - began)
        return min(times)

    ours = measure_best_time(lambda: compute_alphas(build_coincidences(counts_UV)[None], values, "ordinal"))
    theirs = measure_best_time(lambda: krippendorff.alpha(value_counts=counts_UV, level_of_measurement="ordinal"))
    assert ours < theirs
