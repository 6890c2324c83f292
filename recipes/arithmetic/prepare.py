"""Write sums of two numbers to three files: a few to imitate, others to practise on, and others to measure on.

The numbers have two digits, each below five, so that no sum carries. A sum with its operands swapped is
always in the same file.

Usage: python recipes/arithmetic/prepare.py FOLDER [SEED]
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

IMITATION_SHARE = 0.3
HELD_OUT_SHARE = 0.3
"""Shares of the pairs of numbers. The rest is for practice."""


def list_pairs() -> list[tuple[int, int]]:
    """Return all pairs of numbers, the smaller number first."""
    return [*combinations_with_replacement([10 * tens + units for tens in range(1, 5) for units in range(5)], 2)]


def iter_both_orders(pairs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield each pair and the pair with its numbers swapped. A pair of equal numbers is yielded once."""
    for a, b in pairs:
        yield a, b
        if a != b:
            yield b, a


def build_question(a: int, b: int) -> str:
    return f"What is {a} plus {b}?"


def build_example_row(a: int, b: int) -> dict[str, Any]:
    """Return a row for supervised tuning."""
    return {"prompt": build_question(a, b), "completion": str(a + b)}


def build_checked_row(a: int, b: int) -> dict[str, Any]:
    """Return a prompt with its exact answer. Both orders of a pair have one `source`, so that statistics count the
    pair once."""
    return {
        "prompt": build_question(a, b),
        "check": {"kind": "exact", "answer": str(a + b)},
        "source": f"{min(a, b)}+{max(a, b)}",
    }


def main(folder: Path, seed: int) -> None:
    pairs = list_pairs()
    random.Random(seed).shuffle(pairs)
    first_held_out = round(IMITATION_SHARE * len(pairs))
    first_practised = first_held_out + round(HELD_OUT_SHARE * len(pairs))
    parts = {
        "taught": (build_example_row, pairs[:first_held_out]),
        "held_out": (build_checked_row, pairs[first_held_out:first_practised]),
        "practised": (build_checked_row, pairs[first_practised:]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (build_row, part) in parts.items():
        lines = [json.dumps(build_row(a, b)) for a, b in iter_both_orders(part)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} sums, such as {lines[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
