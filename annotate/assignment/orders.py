"""In which order answers stand on an annotator's screen, and what chance decides: pure, and the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence

from align.annotate.store.records import shuffle_of


def counterbalanced_order(ids: Sequence[str], annotator: str, turn: int) -> tuple[str, ...]:
    """The candidates as they stand on the screen, counterbalanced over an annotator's items.

    Of every K turns in a row (from a multiple of K) a candidate's position in the item is shown once in each place: the
    rows of a cyclic Latin square over a random order, in random order (Williams, "Experimental designs balanced for the
    estimation of residual effects", 1949, is the finer one, which needs 2K rows for odd K). Where a position means a
    model, each model stands first equally often.

    Args:
        ids: the K candidates, by position.
        turn: the how-manieth item of K candidates this is for the annotator, from 0.
    """
    k = len(ids)
    block, row = divmod(turn, k)
    rng = random.Random(f"{annotator}/{k}/{block}")
    order, shifts = list(range(k)), list(range(k))
    rng.shuffle(order)
    rng.shuffle(shifts)
    return tuple(ids[order[(place + shifts[row]) % k]] for place in range(k))


def turned(ids: Sequence[str], turn: int) -> tuple[str, ...]:
    """The candidates turned on by so many places: of every K turns each stands once in each place."""
    return tuple(ids[(place + turn) % len(ids)] for place in range(len(ids)))


def chance(share: float, annotator: str, number: int, what: str) -> bool:
    """Whether something that befalls a share of all leases befalls an annotator's lease of this number."""
    return shuffle_of(f"{what}/{annotator}/{number}") < share
