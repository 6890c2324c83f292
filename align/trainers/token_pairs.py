"""A judged pair as tokens, for whichever trainer reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, as rows of tokens.

    Attributes:
        chosen_ids, rejected_ids: prompt and answer, each ending where a score is read.
        chosen_start, rejected_start: where the answer begins.
    """

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_start: int = 0
    rejected_start: int = 0
