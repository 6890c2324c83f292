"""What became of the rows of a source of a data set, in counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SIDES = ("train", "test")
STEPS = {
    "after_score": "dropped by score",
    "after_decontamination": "like evaluation rows", "after_exact_dedup": "exact duplicates",
    "after_near_dedup": "near-duplicates", "after_caps": "over the cap", "after_test_decontamination": "like test rows",
}  # fmt: skip
"""Step of the funnel → what it leaves out."""


def read(source: Mapping[str, Any]) -> int:
    """Rows of a source that were read, those among them that gave no record."""
    counts = source["counts"]
    return counts["read"] + counts.get("skipped_rows", 0) + counts.get("dropped_undecided", 0)


def lost(source: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Why rows of a source are not in, and how many: step by step, and at last what the mixture leaves out."""
    counts = source["counts"]
    yield "refused", counts.get("skipped_rows", 0)
    yield "undecided", counts.get("dropped_undecided", 0)
    yield "dropped in cleaning", counts["read"] - counts["kept"]
    before = counts["kept"]
    for step, why in STEPS.items():
        if step in counts:
            yield why, before - counts[step]
            before = counts[step]
    yield "forgotten", source.get("forgotten", 0)
    left = before - source.get("forgotten", 0) - sum(source["splits"][s]["distinct"] for s in SIDES)
    yield "only measured on" if source["weight"] == 0 else "not in the mixture", left
