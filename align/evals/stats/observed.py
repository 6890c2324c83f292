"""Columns of observations, checked where they come in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Clusters = Sequence[Hashable]
"""One id a row; rows that share one, such as answers to one prompt, depend on each other."""


def columns(**given: ArrayLike) -> list[NDArray[np.float64]]:
    """Columns of one length n ≥ 1 as float64, in the order given; shape [n] each.

    Raises:
        ValueError: a column is empty or no list of numbers, holds NaN or an infinite number, or has another length
            than the first; the message names it.
    """
    found = {name: np.asarray(values, dtype=np.float64) for name, values in given.items()}
    first = next(iter(found))
    for name, column in found.items():
        if column.ndim != 1 or column.size == 0:
            raise ValueError(f"{name} has shape {column.shape}: one number a row is expected, and at least one row")
        if column.size != (rows := found[first].size):
            raise ValueError(f"{name} has {column.size} rows and {first} has {rows}: they must be the same")
        if not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column))[0])
            raise ValueError(f"{name} is {column[row]} in row {row}: a finite number is expected")
    return list(found.values())


def within(low: float, high: float, **given: NDArray[np.float64]) -> None:
    """Refuse columns with a number outside [low, high].

    Raises:
        ValueError: it names the column, the row and the number.
    """
    for name, column in given.items():
        outside = np.flatnonzero((column < low) | (column > high))
        if outside.size:
            raise ValueError(f"{name} is {column[outside[0]]} in row {outside[0]}, which is outside {low} to {high}")


def places(clusters: Clusters | None, rows: int) -> NDArray[np.int64]:
    """The number of each row's cluster, 0 … C−1 in order of first appearance, shape [rows]; without clusters each row
    is one of its own.

    Raises:
        ValueError: there are more or fewer ids than rows.
    """
    if clusters is None:
        return np.arange(rows)
    if len(clusters) != rows:
        raise ValueError(f"{len(clusters)} cluster ids for {rows} rows: one a row is expected")
    place = {id: i for i, id in enumerate(dict.fromkeys(clusters))}
    return np.array([place[id] for id in clusters], dtype=np.int64)


def cluster_means(at: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each cluster's values, shape [C]."""
    return np.bincount(at, weights=values) / np.bincount(at)
