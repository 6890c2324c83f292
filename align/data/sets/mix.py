"""Mixture of sources by weight: the number of times that each row of a data set is written.

The rows of a source are drawn in an order that depends on a hash of the seed and their content. It does not depend on
weights or other sources: a larger share of a source has the same rows and the next ones of that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from align.core.errors import InputError, require
from align.data.dedup.arrays import concatenate
from align.data.dedup.shingles import ODD_MULTIPLIER, mix_bits_in_place

SLACK = 1e-9
"""Tolerance for rounding, as a share."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of sources: the number of times that each row is written, and the target and actual share of each
    source.

    Attributes:
        times: number of times that each row is written, int32 (N); 0 for a row that is left out.
        target_shares: target share of each source, in the unit of the mixture.
        actual_shares: actual share of each source.
        limit: number of the source that bounds the size of the mixture; None if none does.
    """

    times: ndarray
    target_shares: tuple[float, ...]
    actual_shares: tuple[float, ...]
    limit: int | None = None


def compute_draw_keys(ids: ndarray, seed: int) -> ndarray:
    """Return a pseudo-random sort key of each row from a seed and its content id, uint64 (N). Rows of a source are
    drawn in ascending order of it.

    Args:
        ids: first 64 bits of each row's content id, uint64 (N).
    """
    start = np.array([seed], np.uint64) * ODD_MULTIPLIER + np.uint64(0x632BE59BD9B4E019)
    return mix_bits_in_place(ids ^ mix_bits_in_place(start))


def compute_target_shares(
    sizes: Sequence[float], weights: Sequence[float | None], temperature: float | None
) -> tuple[float, ...]:
    """Return the share that each source should have in the mixture, by weights or by size. Shares add up to 1.

    The share of a source with a weight is its weight. The other sources have the remainder in proportion to their
    sizes. If all have a weight, shares are proportional to the weights. With a temperature T, sizes are replaced by
    size^(1/T): 1 keeps them, and a larger T raises small sources (Arivazhagan et al. 2019, arXiv 1907.05019, section
    3.2).

    Args:
        sizes: rows, turns or tokens of each source.
        weights: weight of each source, None for none.
        temperature: None for 1.

    Raises:
        InputError: All weights are 0, or they leave nothing for the sources without a weight.
    """
    set_weights = [weight for weight in weights if weight is not None]
    if len(set_weights) == len(weights):
        problem = "are all 0, which leaves nothing to train on"
        require(sum(set_weights) > 0, "stage.sources, weights", 0, problem, "Give one source a weight above 0.")
        return tuple(weight / sum(set_weights) for weight in set_weights)
    remainder = 1 - sum(set_weights)
    unweighted = len(weights) - len(set_weights)
    problem = (
        f"add up to 1 or more, which leaves no share for the {unweighted} "
        f"source{'' if unweighted == 1 else 's'} without one"
    )
    remedy = "Lower them, or give every source a weight."
    require(remainder > SLACK, "stage.sources, weights", round(sum(set_weights), 6), problem, remedy)
    largest = max(sizes, default=1) or 1
    power = 1 / (temperature or 1)
    pairs = zip(sizes, weights, strict=True)
    bases = [(size / largest) ** power if weight is None else 0 for size, weight in pairs]
    total = sum(bases) or 1
    return tuple(
        remainder * base / total if weight is None else weight for base, weight in zip(bases, weights, strict=True)
    )


def compute_mixture(
    eligible: ndarray,
    source: ndarray,
    units: ndarray,
    draw_keys: ndarray,
    names: Sequence[str],
    *,
    weights: Sequence[float | None],
    total: float | None = None,
    repeat: int = 1,
    temperature: float | None = None,
) -> Mixture:
    """Compute the number of times that each row is written, so that each source gets its target share.

    Without weights, temperature and total, every row is written once. Otherwise the mixture has `total` units, or as
    many as possible without writing a row more than `repeat` times.

    Args:
        eligible: rows that may be in the mixture, bool (N).
        source: number of each row's source, int (N).
        units: units of each row, int64 (N): 1, its turns or its tokens.
        draw_keys: see `compute_draw_keys`.
        names: names of the sources.
        weights, temperature: see `compute_target_shares`.
        total: units of the mixture; None for as many as possible.

    Raises:
        InputError: A source with a weight has no eligible row, or the weights cannot be met without more repetition.
    """
    orders = [sort_by_draw(eligible & (source == number), draw_keys) for number in range(len(names))]
    for name, weight, rows in zip(names, weights, orders, strict=True):
        problem = "has a weight, but none of its rows is left to train on"
        remedy = "Look at its duplicates in the report of a run without weights, or leave it out."
        require(not weight or len(rows) > 0, f"stage.sources.{name}", weight, problem, remedy)
    sizes = [int(units[rows].sum()) for rows in orders]
    times = np.zeros(len(source), np.int32)
    if total is None and temperature is None and all(weight is None for weight in weights):
        for rows in orders:
            times[rows] = 1
        share = normalize_counts(sizes)
        return Mixture(times, share, share)
    target_shares = compute_target_shares(sizes, weights, temperature)
    capacities = [
        repeat * source_units / share if share > SLACK else np.inf
        for source_units, share in zip(sizes, target_shares, strict=True)
    ]
    limit = int(np.argmin(capacities))
    if total is not None and capacities[limit] < total * (1 - SLACK):
        needed = target_shares[limit] * total
        times = int(np.ceil(needed / max(sizes[limit], 1)))
        raise InputError(
            f"stage.sources.{names[limit]}",
            sizes[limit],
            f"is less than the {needed:.0f} that its share {target_shares[limit]:.3g} of {total:g} asks for",
            f"Allow stage.mix.repeat={times}, lower stage.mix.total, or give more rows."
            if sizes[limit]
            else "Give rows, or leave the source out.",
        )
    total_units = total if total is not None else capacities[limit]
    for rows, share in zip(orders, target_shares, strict=True):
        times[rows] = compute_row_repeats(units[rows], share * total_units)
    written_units = [int((units[rows] * times[rows].astype(np.int64)).sum()) for rows in orders]
    return Mixture(times, target_shares, normalize_counts(written_units), None if total is not None else limit)


def sort_by_draw(mask: ndarray, draw_keys: ndarray) -> ndarray:
    """Return the numbers of the rows in a mask (bool (N)), sorted by the keys in which rows are drawn."""
    numbers = np.flatnonzero(mask)
    return numbers[np.lexsort((numbers, draw_keys[numbers]))]


def select_over_caps(mask: ndarray, source: ndarray, draw_keys: ndarray, caps: Sequence[int | None]) -> ndarray:
    """Return the numbers of the rows that exceed their source's cap, which are the last ones in its order of draw.

    Args:
        mask: rows that count, bool (N).
        source: number of each row's source, int (N).
        draw_keys: see `compute_draw_keys`.
        caps: largest number of rows of each source; None for no cap.
    """
    rows_over_cap = [
        sort_by_draw(mask & (source == number), draw_keys)[cap:] for number, cap in enumerate(caps) if cap is not None
    ]
    return concatenate(rows_over_cap)


def compute_row_repeats(sizes: ndarray, units: float) -> ndarray:
    """Return the number of times that each row is written, int32 (N), so that their total size is as near as possible
    to `units`.

    All rows are written equally often, and the first ones once more.

    Args:
        sizes: units of the rows, in their order of draw.
    """
    total = int(sizes.sum())
    if total == 0:
        return np.zeros(len(sizes), np.int32)
    times = int((units + SLACK * total) // total)
    remainder = units - times * total
    ends = np.cumsum(sizes)
    extra = int(np.searchsorted(ends - sizes / 2, remainder, side="left")) if remainder > SLACK * total else 0
    repeats = np.full(len(sizes), times, np.int32)
    repeats[:extra] += 1
    return repeats


def normalize_counts(units: Sequence[float]) -> tuple[float, ...]:
    """Return each number divided by their sum, so that they add up to 1. Returns zeros if the sum is 0."""
    total = sum(units)
    return tuple(count / total if total else 0.0 for count in units)


class Funnel:
    """A record of the rows that remain after each filtering step, with counts by source.

    Args:
        source: number of each row's source, int (N).
        names: names of the sources.

    Attributes:
        kept: whether each row remains, bool (N).
        steps: name of each step → number of rows of each source that remained after it.
        before: number of rows of each source before the last step.
        removed: numbers of the rows that the last step removed, ascending.
        watch: called with the name of each step that removes rows, when it ends.
    """

    def __init__(self, source: ndarray, names: Sequence[str]) -> None:
        self.source = source
        self.names = list(names)
        self.kept = np.ones(len(source), bool)
        self.steps: dict[str, list[int]] = {}
        self.before: list[int] = []
        self.removed = np.zeros(0, np.int64)
        self.watch: Callable[[str], None] = lambda step: None

    def record_step(self, step: str) -> None:
        """Store the number of remaining rows of each source under a step's name."""
        self.steps[step] = np.bincount(self.source[self.kept], minlength=len(self.names)).tolist()

    def drop(self, step: str, rows: ndarray) -> None:
        """Remove rows (their numbers, or a mask, bool (N)) as a named step, store the remaining counts, and call
        `watch`."""
        was_kept = self.kept.copy()
        self.before = [*self.steps.values()][-1]
        self.kept[rows] = False
        self.removed = np.flatnonzero(was_kept & ~self.kept)
        self.record_step(step)
        self.watch(step)

    def count_by_step(self, number: int) -> dict[str, int]:
        """Return a dictionary from each step's name to the number of one source's rows that remained after it."""
        return {step: counts[number] for step, counts in self.steps.items()}
