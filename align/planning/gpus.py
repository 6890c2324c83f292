"""Find the cards that a workload fits on, and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from align.planning.memory import Workload, footprint
from align.planning.shapes import Shape

GB = 1e9
CONTEXT = 1.0
"""GB that CUDA and its libraries take."""
USABLE = 0.9
"""The share of the rest that fragments of free memory leave."""
SHORTEST = 256
FEWEST = 8
"""Tokens of a row, and answers generated together, below which no smaller number is proposed."""
TRIED = 10_000
"""Numbers that are tried for one that divides another."""


class Gpu(NamedTuple):
    """A size of graphics cards, in GB, and the cards of that size."""

    gb: float
    names: str


GPUS = (
    Gpu(8, "RTX 3070, 4060"),
    Gpu(12, "RTX 3060, 4070"),
    Gpu(16, "T4, V100, RTX 4080"),
    Gpu(24, "RTX 3090, 4090, L4"),
    Gpu(40, "A100 40 GB"),
    Gpu(48, "A40, L40S, RTX 6000 Ada"),
    Gpu(80, "A100, H100"),
    Gpu(141, "H200"),
)


class Change(NamedTuple):
    """Something that may be changed.

    Attributes:
        key, value: as they are written on a command line.
        work: the workload as it was, with this changed.
    """

    key: str
    value: str
    work: Workload


def room_on(gb: float) -> float:
    """Return the bytes that tensors may take on a card."""
    return max(0.0, gb - CONTEXT) * USABLE * GB


def changes_to_fit(shape: Shape, work: Workload, room: float) -> list[str] | None:
    """Return what to add to a command line so that it fits. Returns an empty list if it does, None if nothing helps.

    Changes are made in the order of what they cost, until it fits; then those that are not needed are taken back, the
    most expensive first. The rest was predicted to fit.

    Args:
        room: bytes.
    """

    def fits(one: Workload) -> bool:
        return footprint(shape, one).peak <= room

    order: list[str] = []
    words: dict[str, str] = {}
    changed = work
    while not fits(changed):
        change = next(changes(changed), None)
        if change is None:
            return None
        changed = change.work
        words[change.key] = f"{change.key}={change.value}"
        order = [*(key for key in order if key != change.key), change.key]
    for key in reversed(order):
        without = replace(changed, **{name: getattr(work, name) for name in FIELDS[key]})
        if fits(without):
            changed = without
            del words[key]
    return list(words.values())


FIELDS = {
    "stage.gradient_checkpointing": ("recompute",),
    "stage.micro_batch": ("micro_batch",),
    "rollout.batch_size": ("rollout_rows",),
    "stage.value_backbone": ("value_backbone",),
    "method": ("method",),
    "data.max_length": ("length", "prompt"),
}
"""Key → the fields of a workload that it decides."""


def changes(work: Workload) -> Iterator[Change]:
    """Yield the changes that are possible, the cheapest first: time for activations, then time for the rest, then what
    is learned, then what is learned from."""
    if not work.recompute:
        yield Change("stage.gradient_checkpointing", "true", replace(work, recompute=True))
    if smaller := largest_part(work.step or work.micro_batch, work.micro_batch):
        yield Change("stage.micro_batch", str(smaller), replace(work, micro_batch=smaller))
    if work.rollout_rows > FEWEST:
        half = work.rollout_rows // 2
        yield Change("rollout.batch_size", str(half), replace(work, rollout_rows=half))
    if work.stage == "ppo" and work.value_backbone == "own":
        yield Change("stage.value_backbone", "policy", replace(work, value_backbone="policy"))
    if not work.from_adapter and (work.method == "lora" or (work.stage == "ppo" and work.method == "full")):
        yield Change("method", "qlora", replace(work, method="qlora"))
    longest = work.prompt or work.length
    if longest > SHORTEST:
        half = max(SHORTEST, longest // 2)
        shorter = {"prompt": half, "length": half + work.answer} if work.prompt else {"length": half}
        yield Change("data.max_length", str(half), replace(work, **shorter))


def largest_part(whole: int, below: int) -> int | None:
    """Return the largest number below another that divides the whole. Returns None if there is none. Of a whole beyond
    `TRIED` squared it may be a smaller one: not every number is tried."""
    most = min(below - 1, whole)
    if most < 1:
        return None
    first = -(-whole // most)  # the smallest share that may leave a number below
    by_share = (whole // share for share in range(first, first + TRIED) if whole % share == 0)
    return next(by_share, None) or next(n for n in range(min(most, TRIED), 0, -1) if whole % n == 0)
