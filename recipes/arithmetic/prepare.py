"""Sums of two numbers with two digits, each digit below five, so that nothing is carried: a few to be taught, others to
practise on, and others again to measure on. A sum and its turn-round, 23 + 41 and 41 + 23, are always in one file.

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

TAUGHT, HELD_OUT = 0.3, 0.3
"""Shares of the pairs of numbers; the others are practised on."""


def pairs() -> Iterator[tuple[int, int]]:
    """Each two numbers, the smaller one first."""
    return combinations_with_replacement([10 * tens + ones for tens in range(1, 5) for ones in range(5)], 2)


def question(a: int, b: int) -> str:
    return f"What is {a} plus {b}?"


def asked(some: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Each pair both ways round."""
    for a, b in some:
        yield from {(a, b): None, (b, a): None}


def taught(a: int, b: int) -> dict[str, Any]:
    """A row to imitate."""
    return {"prompt": question(a, b), "completion": str(a + b)}


def checked(a: int, b: int) -> dict[str, Any]:
    """A prompt, and what its answer has to be: the number and nothing else. The pair is one piece of evidence."""
    return {
        "prompt": question(a, b), "check": {"kind": "exact", "answer": str(a + b)}, "source": f"{min(a, b)}+{max(a, b)}"
    }  # fmt: skip


def main(folder: Path, seed: int) -> None:
    found = [*pairs()]
    random.Random(seed).shuffle(found)
    few, apart = round(TAUGHT * len(found)), round(HELD_OUT * len(found))
    parts = {
        "taught": (taught, found[:few]), "held_out": (checked, found[few : few + apart]),
        "practised": (checked, found[few + apart :]),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, (row, some) in parts.items():
        lines = [json.dumps(row(a, b)) for a, b in asked(some)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} sums, such as {lines[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
