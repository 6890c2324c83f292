"""The GPUs that a workload fits on, and the settings that can be changed to make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from align.planning.memory import Workload, predict_footprint
from align.planning.shapes import Shape

GB = 1e9
CONTEXT = 1.0
"""GB of GPU memory that the CUDA context and libraries use."""
USABLE = 0.9
"""Usable share of the remaining GPU memory, because of fragmentation."""
SHORTEST = 256
FEWEST = 8
"""Minimum values that are proposed for the tokens of a row (`SHORTEST`) and the rollout batch size (`FEWEST`)."""
TRIED = 10_000
"""Maximum number of candidates in the search for a divisor."""


class Gpu(NamedTuple):
    """A memory size of GPUs in GB, and the names of GPUs of that size."""

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
    """A change of one setting that makes a workload use less memory: its key, its new value and the resulting workload.

    Attributes:
        key, value: the setting and its new value on the command line.
        work: the workload with this change.
    """

    key: str
    value: str
    work: Workload


def compute_usable_bytes(gb: float) -> float:
    """Return the bytes available for tensors on a GPU with `gb` GB of memory, after the CUDA context and
    fragmentation."""
    return max(0.0, gb - CONTEXT) * USABLE * GB


def find_changes_to_fit(shape: Shape, work: Workload, room: float) -> list[str] | None:
    """Return the settings to change, as `key=value` arguments, so that a workload fits into `room` bytes. Returns an
    empty list if it fits already, and None if no changes are enough.

    Changes are applied in the order of their cost until the workload fits. Changes that turn out unnecessary are then
    removed, the most expensive first. The remaining changes were predicted to fit.

    Args:
        room: available bytes.
    """

    def fits(candidate: Workload) -> bool:
        return predict_footprint(shape, candidate).peak <= room

    order: list[str] = []
    words: dict[str, str] = {}
    changed = work
    while not fits(changed):
        change = next(iter_changes(changed), None)
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
"""Setting → names of the `Workload` fields that it determines."""


def iter_changes(work: Workload) -> Iterator[Change]:
    """Yield the settings that can still be changed to save memory, the cheapest first. First come those that cost time,
    then those that change what is trained, then those that cut the data."""
    if not work.recompute:
        yield Change("stage.gradient_checkpointing", "true", replace(work, recompute=True))
    if smaller := find_largest_divisor(work.step or work.micro_batch, work.micro_batch):
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


def find_largest_divisor(whole: int, below: int) -> int | None:
    """Return the largest divisor of `whole` that is less than `below`, or None if `below` is 1 or less. If `whole`
    exceeds `TRIED` squared, it may be a smaller divisor, because not all numbers are tried."""
    most = min(below - 1, whole)
    if most < 1:
        return None
    first = -(-whole // most)  # the smallest quotient whose divisor is not above `most`
    by_quotient = (whole // quotient for quotient in range(first, first + TRIED) if whole % quotient == 0)
    return next(by_quotient, None) or next(n for n in range(min(most, TRIED), 0, -1) if whole % n == 0)
