"""What an annotator holds, and how far they are: what the queue gives out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from annotate.store import Item, Judgement


@dataclass(frozen=True, slots=True)
class Task:
    """An item as one annotator holds it.

    Attributes:
        token: of the lease; only its annotator can vote with it.
        item: the prompt and its candidates, by position.
        purpose: as a judgement has it; never shown to an annotator.
        shown: the candidates' ids as they are to stand on the screen.
        draft: what the annotator had saved of a judgement, or had said before taking it back; empty at first.
        expires_at: seconds since 1970, unless renewed.
    """

    token: str
    item: Item
    purpose: str
    shown: tuple[str, ...]
    draft: Mapping[str, Any]
    expires_at: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an annotator and their project are.

    Attributes:
        mine: the annotator's standing rankings, gold and repeats among them.
        quota: asked of them; 0: no number.
        done, wanted: rankings of the whole project, gold and repeats aside.
    """

    mine: int
    quota: int
    done: int
    wanted: int


def draft_of(judgement: Judgement) -> dict[str, Any]:
    """What a judgement says, as a draft of the next one."""
    names = ("tiers", "strength", "quality", "ratings", "flagged", "skipped", "rationale", "demonstration")
    return {name: getattr(judgement, name) for name in names}
