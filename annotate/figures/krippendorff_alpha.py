"""Krippendorff's alpha, 1 − D_o/D_e: agreement of any number of raters, with missing ratings, on four levels.

Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section D.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Level = Literal["nominal", "ordinal", "interval", "ratio"]


def krippendorff_alpha(ratings_RU: ArrayLike, level: Level) -> float:
    """Compute alpha of a table of ratings. Returns nan if no unit has two ratings or all paired ratings are equal.

    Args:
        ratings_RU: one row a rater, one column a unit; nan where the rater did not rate the unit.
        level: the level of measurement, which decides how much a difference weighs.
    """
    ratings = np.asarray(ratings_RU, dtype=np.float64)
    values_V = np.unique(ratings[~np.isnan(ratings)])
    coincidences_VV = build_coincidences(count_ratings(ratings, values_V))
    return float(compute_alphas(coincidences_VV[None], values_V, level)[0])


def count_ratings(ratings_RU: NDArray[np.generic], values_V: NDArray[np.generic]) -> NDArray[np.int64]:
    """Count how many raters gave each unit each value, shape [U, V]. Missing ratings count nowhere."""
    return (ratings_RU[:, :, None] == values_V).sum(axis=0)


def build_coincidences(counts_UV: NDArray[np.int64]) -> NDArray[np.float64]:
    """Build the coincidence matrix, [V, V]: the ordered pairs of ratings of a unit by their two values, divided by the
    unit's number of ratings less one. Units with fewer than two ratings have no pairs.

    Args:
        counts_UV: how many raters gave each unit each value.
    """
    ratings_U = counts_UV.sum(axis=1)
    paired_UV = counts_UV[ratings_U > 1]
    weighted_UV = paired_UV / (ratings_U[ratings_U > 1, None] - 1)
    return weighted_UV.T @ paired_UV - np.diag(weighted_UV.sum(axis=0))


def compute_alphas(
    coincidences_BVV: NDArray[np.float64], values_V: NDArray[np.generic], level: Level
) -> NDArray[np.float64]:
    """Compute alpha of each of B coincidence matrices, such as those of resamples; nan where all ratings are equal.

    Args:
        values_V: the values in ascending order.
    """
    distances_BVV = compute_squared_distances(coincidences_BVV, values_V, level)
    observed_B = (coincidences_BVV * distances_BVV).sum(axis=(1, 2))
    expected_B = compute_expected_disagreements(coincidences_BVV, distances_BVV)
    return 1 - np.divide(observed_B, expected_B, out=np.full_like(observed_B, np.nan), where=expected_B > 0)


def compute_squared_distances(
    coincidences_BVV: NDArray[np.float64], values_V: NDArray[np.generic], level: Level
) -> NDArray[np.float64]:
    """Compute the squared distance of each two values, [B, V, V]. Only ordinal distances depend on the matrix."""
    if level == "ordinal":
        # The distance is the number of ratings from one value to the other, with half of the ratings at both ends.
        ratings_BV = coincidences_BVV.sum(axis=2)
        middles_BV = ratings_BV.cumsum(axis=1) - ratings_BV / 2
        return (middles_BV[:, :, None] - middles_BV[:, None, :]) ** 2
    differences_VV = np.subtract.outer(values_V, values_V).astype(np.float64)
    if level == "nominal":
        distances_VV = (differences_VV != 0).astype(np.float64)
    elif level == "interval":
        distances_VV = differences_VV**2
    else:
        sums_VV = np.add.outer(values_V, values_V).astype(np.float64)
        ratios_VV = np.divide(differences_VV, sums_VV, out=np.zeros_like(sums_VV), where=sums_VV != 0)
        distances_VV = ratios_VV**2
    return np.broadcast_to(distances_VV, coincidences_BVV.shape)


def compute_expected_disagreements(
    coincidences_BVV: NDArray[np.float64], distances_BVV: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum the distances of pairs that chance would draw from these ratings, [B], as many pairs as the matrix has."""
    ratings_BV = coincidences_BVV.sum(axis=2)
    pairs_BVV = ratings_BV[:, :, None] * ratings_BV[:, None, :]  # the diagonal has no distance
    drawn_B = np.maximum(ratings_BV.sum(axis=1) - 1, 1)  # an empty matrix has no ratings to draw from
    return (pairs_BVV * distances_BVV).sum(axis=(1, 2)) / drawn_B
