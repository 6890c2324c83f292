"""What each step of making a data set leaves of each source."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


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

    def __init__(self, source: np.ndarray, names: Sequence[str]) -> None:
        self.source, self.names = source, list(names)
        self.kept = np.ones(len(source), bool)
        self.steps: dict[str, list[int]] = {}
        self.before: list[int] = []
        self.removed = np.zeros(0, np.int64)
        self.watch: Callable[[str], None] = lambda step: None

    def note(self, step: str) -> None:
        """A step ends."""
        self.steps[step] = np.bincount(self.source[self.kept], minlength=len(self.names)).tolist()

    def drop(self, step: str, rows: np.ndarray) -> None:
        """A step leaves out these rows (numbers, or bool (N))."""
        before = self.kept.copy()
        self.before = [*self.steps.values()][-1]
        self.kept[rows] = False
        self.removed = np.flatnonzero(before & ~self.kept)
        self.note(step)
        self.watch(step)

    def of(self, number: int) -> dict[str, int]:
        """Step → the rows of one source that it left."""
        return {step: counts[number] for step, counts in self.steps.items()}
