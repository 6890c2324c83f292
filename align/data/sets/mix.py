"""How often each row of a data set is written: sources in proportion to their weights.

A source's rows have one order in which they are drawn, by a hash of the seed and their content. Whatever the weights
and the other sources, more rows of a source are these and the next ones of that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from align.core.errors import InputError, require
from align.data.dedup.arrays import join
from align.data.dedup.shingles import ODD, mixed

SLACK = 1e-9
"""Of a share, that rounding may cost."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mixture.

    Attributes:
        times: how often each row is written, int32 (N); 0 for a row that is left out.
        asked: the share of each source that was asked for, in the unit of the mixture.
        got: the share that it has.
        limit: the number of the source that bounds the mixture; None where nothing did.
    """

    times: ndarray
    asked: tuple[float, ...]
    got: tuple[float, ...]
    limit: int | None = None


def draws(ids: ndarray, seed: int) -> ndarray:
    """Return where each row stands in its source's order of draw: the lower, the earlier.

    Args:
        ids: the first 64 bits of each row's content id, uint64 (N).

    Returns:
        uint64 (N).
    """
    start = np.array([seed], np.uint64) * ODD + np.uint64(0x632BE59BD9B4E019)
    return mixed(ids ^ mixed(start))


def shares(sizes: Sequence[float], weights: Sequence[float | None], temperature: float | None) -> tuple[float, ...]:
    """Return the share of each source, adding up to 1.

    Sources with a weight have it, and the others have what is left of 1 in proportion to their sizes; where all have
    one, these are proportions. With a temperature T and no weights, shares go by size^(1/T): 1 keeps the sizes, larger
    ones raise small sources (Arivazhagan et al. 2019, arXiv 1907.05019, section 3.2).

    Args:
        sizes: rows, turns or tokens of each source.

    Raises:
        InputError: the weights leave nothing for the sources without one, or nothing at all.
    """
    given = [weight for weight in weights if weight is not None]
    if len(given) == len(weights):
        problem = "are all 0, which leaves nothing to train on"
        require(sum(given) > 0, "stage.sources, weights", 0, problem, "Give one source a weight above 0.")
        return tuple(weight / sum(given) for weight in given)
    rest = 1 - sum(given)
    without = len(weights) - len(given)
    problem = f"leave nothing of 1 for the {without} source{'' if without == 1 else 's'} without one"
    remedy = "Lower them, or give every source a weight."
    require(rest > SLACK, "stage.sources, weights", round(sum(given), 6), problem, remedy)
    largest, power = max(sizes, default=1) or 1, 1 / (temperature or 1)
    both = zip(sizes, weights, strict=True)
    bases = [(size / largest) ** power if weight is None else 0 for size, weight in both]
    left = sum(bases) or 1
    return tuple(rest * base / left if weight is None else weight for base, weight in zip(bases, weights, strict=True))


def mixture(
    inside: ndarray,
    source: ndarray,
    size: ndarray,
    draw: ndarray,
    names: Sequence[str],
    *,
    weights: Sequence[float | None],
    total: float | None = None,
    repeat: int = 1,
    temperature: float | None = None,
) -> Mixed:
    """Return how often each row is seen.

    Without weights, a temperature and a total, every row is seen once. Otherwise the mixture has `total` units, or as
    many as there can be without seeing any row more than `repeat` times.

    Args:
        inside: the rows that the mixture is made of, bool (N).
        source: the number of each row's source, int (N).
        size: the units that each row has, int64 (N): 1, its turns or its tokens.
        draw: see `draws`.
        names: of the sources.

    Raises:
        InputError: a source with a weight has no row inside, or the weights cannot be met without more repetition.
    """
    orders = [drawn(inside & (source == number), draw) for number in range(len(names))]
    for name, weight, rows in zip(names, weights, orders, strict=True):
        problem = "has a weight, and none of its rows is left to train on"
        remedy = "Look at its duplicates in the report of a run without weights, or leave it out."
        require(not weight or len(rows) > 0, f"stage.sources.{name}", weight, problem, remedy)
    sizes = [int(size[rows].sum()) for rows in orders]
    times = np.zeros(len(source), np.int32)
    if total is None and temperature is None and all(weight is None for weight in weights):
        for rows in orders:
            times[rows] = 1
        share = proportions(sizes)
        return Mixed(times, share, share)
    asked = shares(sizes, weights, temperature)
    room = [repeat * units / share if share > SLACK else np.inf for units, share in zip(sizes, asked, strict=True)]
    limit = int(np.argmin(room))
    if total is not None and room[limit] < total * (1 - SLACK):
        needed = asked[limit] * total
        times = int(np.ceil(needed / max(sizes[limit], 1)))
        raise InputError(
            f"stage.sources.{names[limit]}",
            sizes[limit],
            f"is less than the {needed:.0f} that its share {asked[limit]:.3g} of {total:g} asks for",
            f"Allow stage.mix.repeat={times}, lower stage.mix.total, or give more rows."
            if sizes[limit]
            else "Give rows, or leave the source out.",
        )
    wanted = total if total is not None else room[limit]
    for rows, share in zip(orders, asked, strict=True):
        times[rows] = seen(size[rows], share * wanted)
    got = [int((size[rows] * times[rows].astype(np.int64)).sum()) for rows in orders]
    return Mixed(times, asked, proportions(got), None if total is not None else limit)


def drawn(rows: ndarray, draw: ndarray) -> ndarray:
    """Return the numbers of some rows (bool (N)) in their order of draw."""
    numbers = np.flatnonzero(rows)
    return numbers[np.lexsort((numbers, draw[numbers]))]


def over_caps(kept: ndarray, source: ndarray, draw: ndarray, caps: Sequence[int | None]) -> ndarray:
    """Return the numbers of the rows that are more than their source's cap: the last ones of its order of draw.

    Args:
        kept: the rows that count, bool (N).
        caps: rows of each source at most; None for all.
    """
    over = [drawn(kept & (source == number), draw)[cap:] for number, cap in enumerate(caps) if cap is not None]
    return join(over)


def seen(sizes: ndarray, units: float) -> ndarray:
    """Return how often each row is seen so that they come to so many units: all rows as often as goes, and the first
    ones once more, up to the row that comes nearest.

    Args:
        sizes: of the rows in their order of draw.
    """
    whole = int(sizes.sum())
    if whole == 0:
        return np.zeros(len(sizes), np.int32)
    times = int((units + SLACK * whole) // whole)
    rest = units - times * whole
    ends = np.cumsum(sizes)
    more = int(np.searchsorted(ends - sizes / 2, rest, side="left")) if rest > SLACK * whole else 0
    made = np.full(len(sizes), times, np.int32)
    made[:more] += 1
    return made


def proportions(units: Sequence[float]) -> tuple[float, ...]:
    """Return the share of each in their sum."""
    whole = sum(units)
    return tuple(one / whole if whole else 0.0 for one in units)


class Funnel:
    """The rows that are still in, step by step.

    Args:
        source: the number of each row's source, int (N).
        names: of the sources.

    Attributes:
        kept: which rows are in, bool (N).
        steps: name of each step → rows of each source that it left.
        before: rows of each source that came to the step that ended last.
        removed: numbers of the rows that it left out, ascending.
        watch: called with the name of each step that leaves rows out, when it ends.
    """

    def __init__(self, source: ndarray, names: Sequence[str]) -> None:
        self.source = source
        self.names = list(names)
        self.kept = np.ones(len(source), bool)
        self.steps: dict[str, list[int]] = {}
        self.before: list[int] = []
        self.removed = np.zeros(0, np.int64)
        self.watch: Callable[[str], None] = lambda step: None

    def note(self, step: str) -> None:
        """End a step."""
        self.steps[step] = np.bincount(self.source[self.kept], minlength=len(self.names)).tolist()

    def drop(self, step: str, rows: ndarray) -> None:
        """Leave out these rows (numbers, or bool (N)), and end a step."""
        before = self.kept.copy()
        self.before = [*self.steps.values()][-1]
        self.kept[rows] = False
        self.removed = np.flatnonzero(before & ~self.kept)
        self.note(step)
        self.watch(step)

    def of(self, number: int) -> dict[str, int]:
        """Return step → the rows of one source that it left."""
        return {step: counts[number] for step, counts in self.steps.items()}
