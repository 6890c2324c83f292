"""What each step of making a data set leaves of each source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Funnel:
    """The rows that are still in, step by step.

    Args:
        source: the number of each row's source, int (N).
        names: of the sources.

    Attributes:
        kept: which rows are in, bool (N).
        steps: name of each step → rows of each source that it left.
    """

    def __init__(self, source: np.ndarray, names: Sequence[str]) -> None:
        self.source, self.names = source, list(names)
        self.kept = np.ones(len(source), bool)
        self.steps: dict[str, list[int]] = {}

    def note(self, step: str) -> None:
        """A step ends."""
        self.steps[step] = np.bincount(self.source[self.kept], minlength=len(self.names)).tolist()

    def drop(self, step: str, rows: np.ndarray) -> None:
        """A step leaves out these rows (numbers, or bool (N))."""
        self.kept[rows] = False
        self.note(step)

    def of(self, number: int) -> dict[str, int]:
        """Step → the rows of one source that it left."""
        return {step: counts[number] for step, counts in self.steps.items()}
