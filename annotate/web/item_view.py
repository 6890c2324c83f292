"""An item as the page shows it, and what the page says of it as a judgement.

The page knows answers by their place on the screen, 0 to K-1: an id would tell which model wrote which.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from align.annotate.assignment.tasks import Task
from align.annotate.store import Judgement, Vote, storable
from align.annotate.web.markup import rendered, written
from align.core.errors import require

Place = int
PROMPT = -1
"""Where a flag means the prompt."""


class JudgementBody(BaseModel):
    """What the page says of an item; answers by place.

    Attributes:
        tiers: best first; empty where the item is skipped.
        strength: of a pair, how much better the first tier is, 1 to 3; 0 of a tie.
        flagged: harmful answers; -1: the prompt.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    tiers: list[list[Place]] = Field(default=[], max_length=9)
    strength: int | None = Field(default=None, ge=0, le=3)
    quality: Literal["", "good", "bad"] = ""
    ratings: dict[str, dict[str, int]] = Field(default={}, max_length=9)
    flagged: list[Place] = Field(default=[], max_length=10)
    skipped: str = Field(default="", max_length=20)
    seconds: float | None = Field(default=None, ge=0, le=1e6)
    rationale: str = Field(default="", max_length=20_000)
    demonstration: str = Field(default="", max_length=100_000)


def item_as_json(task: Task) -> dict[str, Any]:
    """The item as JSON: HTML that does nothing, in the order of the screen, without a trace of who wrote what."""
    texts = {candidate.id: candidate.text for candidate in task.item.candidates}
    cut = {candidate.id: not candidate.ended for candidate in task.item.candidates}
    return {
        "token": task.token,
        "prompt": [{"role": turn.role, **readings(turn.content)} for turn in task.item.prompt.messages],
        "answers": [
            {**readings(texts[id]), "empty": not texts[id].strip(), "cut": cut[id]} for id in task.display_order
        ],
        "draft": placed(task, task.draft),
        "expires_at": task.expires_at,
    }


def readings(text: str) -> dict[str, str]:
    """A text as HTML, as Markdown and as it was written: the page shows the one or the other."""
    return {"html": rendered(text), "written": written(text)}


def opinion(task: Task, vote: Vote) -> dict[str, Any]:
    """All that an annotator said of the item, for whoever settles it: answers by place, and their words as HTML."""
    place = {id: index for index, id in enumerate(task.display_order)} | {task.item.id: PROMPT}
    return {
        "who": vote.annotator,
        "tiers": [[place[id] for id in tier] for tier in vote.tiers],
        "strength": vote.strength,
        "quality": vote.quality,
        "ratings": {str(place[id]): dict(rated) for id, rated in vote.ratings.items()},
        "flagged": [place[id] for id in vote.flagged],
        "skipped": vote.skipped,
        "rationale": readings(vote.rationale) if vote.rationale else None,
        "demonstration": readings(vote.demonstration) if vote.demonstration else None,
    }


def judgement_of(task: Task, body: JudgementBody) -> Judgement:
    """What the page said, of candidates by id.

    Raises:
        InputError: a place that is not on the screen.
    """
    k = len(task.display_order)

    def id_at(place: Place, field: str) -> str:
        require(0 <= place < k, field, place, f"there are {k} answers", f"Name a place from 0 to {k - 1}.")
        return task.display_order[place]

    places = {name: int(name) if re.fullmatch("[0-9]", name) else k for name in body.ratings}
    return Judgement(
        tiers=tuple(tuple(id_at(place, "tiers") for place in tier) for tier in body.tiers),
        strength=body.strength if k == 2 else None,
        quality=body.quality,
        ratings={id_at(places[name], "ratings"): rated for name, rated in body.ratings.items()},
        flagged=tuple(task.item.id if place == PROMPT else id_at(place, "flagged") for place in body.flagged),
        skipped=body.skipped,
        seconds=body.seconds,
        rationale=storable(body.rationale),
        demonstration=storable(body.demonstration),
    )


def placed(task: Task, draft: Mapping[str, Any]) -> dict[str, Any]:
    """A draft in the page's words: one of its own as it is, one that `AssignmentQueue.undo` made of a judgement by
    place."""
    if "tiers" not in draft or draft.get("places", False):
        return dict(draft)
    place = {id: index for index, id in enumerate(task.display_order)} | {task.item.id: PROMPT}
    return dict(draft) | {
        "places": True,
        "tiers": [[place[id] for id in tier] for tier in draft["tiers"]],
        "ratings": {str(place[id]): rated for id, rated in draft["ratings"].items()},
        "flagged": [place[id] for id in draft["flagged"]],
    }
