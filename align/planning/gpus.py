"""Which card a workload fits on, and what to change where it does not. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from align.planning.memory import footprint
from align.planning.shapes import Shape
from align.planning.workload import Workload

GB = 1e9
CONTEXT, USABLE = 1.0, 0.9
"""GB that CUDA and its libraries take, and the share of the rest that fragments of free memory leave."""
SHORTEST, FEWEST = 256, 8
"""Tokens of a row, and answers generated together, below which no smaller number is proposed."""
TRIED = 10_000
"""Numbers that are tried for one that divides another."""


class Gpu(NamedTuple):
    """Attributes:
    gb: its memory.
    names: cards of that size.
    """

    gb: float
    names: str


GPUS = (
    Gpu(8, "RTX 3070, 4060"), Gpu(12, "RTX 3060, 4070"), Gpu(16, "T4, V100, RTX 4080"),
    Gpu(24, "RTX 3090, 4090, L4"), Gpu(40, "A100 40 GB"),
    Gpu(48, "A40, L40S, RTX 6000 Ada"), Gpu(80, "A100, H100"), Gpu(141, "H200"),
)  # fmt: skip


class Change(NamedTuple):
    """Something that may be changed.

    Attributes:
        key, value: as they are written on a command line.
        work: the workload as it was, with this changed.
    """

    key: str
    value: str
    work: Workload

    @property
    def word(self) -> str:
        return f"{self.key}={self.value}"


def room_on(gb: float) -> float:
    """Bytes that tensors may take on a card."""
    return max(0.0, gb - CONTEXT) * USABLE * GB


def changes_to_fit(shape: Shape, work: Workload, room: float) -> list[str] | None:
    """What to add to a command line so that it fits: nothing where it does, None where nothing helps.

    Changes are made in the order of what they cost, until it fits; then those that are not needed are taken back, the
    dearest first. What is left was predicted to fit, as it stands.

    Args:
        room: bytes.
    """

    def fits(one: Workload) -> bool:
        return footprint(shape, one).peak <= room

    taken: list[str] = []
    words: dict[str, str] = {}
    now = work
    while not fits(now):
        change = next(changes(now), None)
        if change is None:
            return None
        now = change.work
        words[change.key] = change.word
        taken = [*(key for key in taken if key != change.key), change.key]
    for key in reversed(taken):
        if fits(without := restored(now, work, key)):
            now = without
            del words[key]
    return list(words.values())


FIELDS = {
    "stage.gradient_checkpointing": ("recompute",), "stage.micro_batch": ("micro_batch",),
    "rollout.batch_size": ("rollout_rows",), "stage.value_backbone": ("value_backbone",), "method": ("method",),
    "data.max_length": ("length", "prompt"),
}  # fmt: skip
"""Key → what of a workload it decides."""


def restored(now: Workload, before: Workload, key: str) -> Workload:
    """A workload with what a key decides as it was before."""
    return replace(now, **{name: getattr(before, name) for name in FIELDS[key]})


def changes(work: Workload) -> Iterator[Change]:
    """What may be changed next, the cheapest first: time for activations, then time for the other things, then what is
    learned, then what is learned from."""
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
    """The largest number below another that divides the whole; None where there is none. Of a whole beyond `TRIED`
    squared it may be a smaller one: not every number is tried."""
    most = min(below - 1, whole)
    if most < 1:
        return None
    first = -(-whole // most)  # the smallest share that may leave a number below
    by_share = (whole // share for share in range(first, first + TRIED) if whole % share == 0)
    return next(by_share, None) or next(n for n in range(min(most, TRIED), 0, -1) if whole % n == 0)
