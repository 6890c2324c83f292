"""Checks of columns with one number per row, and the clusters that rows belong to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Clusters = Sequence[Hashable]
"""One cluster id per row. Rows with the same id, such as answers to one prompt, depend on each other."""


def to_columns(**values_by_name: ArrayLike) -> list[NDArray[np.float64]]:
    """Return the given columns of numbers as float64 arrays of one common shape [n], n ≥ 1, in the order of the
    arguments. Raises ValueError otherwise.

    Raises:
        ValueError: a column is empty, is not a list of numbers, holds NaN or an infinite number, or has another length
            than the first. The message names the column.
    """
    columns_by_name = {name: np.asarray(values, dtype=np.float64) for name, values in values_by_name.items()}
    first = next(iter(columns_by_name))
    size = columns_by_name[first].size
    for name, column in columns_by_name.items():
        if column.ndim != 1 or column.size == 0:
            raise ValueError(f"{name} has shape {column.shape}: one number a row is expected, and at least one row")
        if column.size != size:
            raise ValueError(f"{name} has {column.size} rows and {first} has {size}: they must be the same")
        if not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column))[0])
            raise ValueError(f"{name} is {column[row]} in row {row}: a finite number is expected")
    return list(columns_by_name.values())


def require_within(low: float, high: float, **columns_by_name: NDArray[np.float64]) -> None:
    """Raise ValueError if a column has a number outside [low, high]. The message names the column, the row and the
    number."""
    for name, column in columns_by_name.items():
        outside = np.flatnonzero((column < low) | (column > high))
        if outside.size:
            raise ValueError(f"{name} is {column[outside[0]]} in row {outside[0]}, which is outside {low} to {high}")


def number_clusters(clusters: Clusters | None, rows: int) -> NDArray[np.int64]:
    """Return the index of each row's cluster, 0 … C−1 in order of first appearance; shape [rows]. If `clusters` is
    None, each row is a cluster.

    Raises:
        ValueError: the number of ids differs from the number of rows.
    """
    if clusters is None:
        return np.arange(rows)
    if len(clusters) != rows:
        raise ValueError(f"{len(clusters)} cluster ids for {rows} rows: one a row is expected")
    number_of_id = {id: i for i, id in enumerate(dict.fromkeys(clusters))}
    return np.array([number_of_id[id] for id in clusters], dtype=np.int64)


def average_clusters(cluster_numbers: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each cluster's values, shape [C]. `cluster_numbers` holds the cluster's index of each
    value."""
    return np.bincount(cluster_numbers, weights=values) / np.bincount(cluster_numbers)
