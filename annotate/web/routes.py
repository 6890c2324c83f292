"""The pages' requests as JSON: leases, votes, undo and drafts. A vote's answer brings the next item, so that one
request is one step.

The page knows answers by their place on the screen, 0 to K-1: an id would tell which model wrote which.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from align.annotate.accounts import Person
from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.leases import Task, Terms, mode_of, opinions_of, terms_now
from align.annotate.store import Judgement, Store, Vote, storable
from align.annotate.store.projects import guidelines_of, settings_of
from align.annotate.web.access import manages
from align.annotate.web.markup import compared, rendered, written
from align.annotate.web.templating import WORDS
from align.core.chain import to_canonical_json
from align.core.errors import require

PROMPT = -1
"""Where a flag means the prompt."""


class StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class JudgementBody(StrictBody):
    """What the page says of an item; answers by place.

    Attributes:
        tiers: best first; empty where the item is skipped.
        strength: of a pair, how much better the first tier is, 1 to 3; 0 of a tie.
        flagged: harmful answers; -1: the prompt.
    """

    tiers: list[list[int]] = Field(default=[], max_length=9)
    strength: int | None = Field(default=None, ge=0, le=3)
    quality: Literal["", "good", "bad"] = ""
    ratings: dict[str, dict[str, int]] = Field(default={}, max_length=9)
    flagged: list[int] = Field(default=[], max_length=10)
    skipped: str = Field(default="", max_length=20)
    seconds: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    rationale: str = Field(default="", max_length=20_000)
    demonstration: str = Field(default="", max_length=100_000)


def item_as_json(task: Task) -> dict[str, Any]:
    """Return the item as JSON: HTML that does nothing, in the order of the screen, without a trace of who wrote
    what."""
    by_id = {candidate.id: candidate for candidate in task.item.candidates}
    answers = [by_id[id] for id in task.display_order]
    return {
        "token": task.token,
        "prompt": [{"role": turn.role, **readings(turn.content)} for turn in task.item.prompt.messages],
        "answers": [
            {**readings(answer.text), "empty": not answer.text.strip(), "cut": not answer.ended} for answer in answers
        ],
        "draft": placed(task, task.draft),
        "expires_at": task.expires_at,
    }


def readings(text: str) -> dict[str, str]:
    """Return a text as HTML, as Markdown and as it was written: the page shows the one or the other."""
    return {"html": rendered(text), "written": written(text)}


def opinion(task: Task, vote: Vote) -> dict[str, Any]:
    """Return all that an annotator said of the item, for whoever settles it: answers by place, and their words as
    HTML."""
    return {
        "who": vote.annotator,
        **by_place(task, {"tiers": vote.tiers, "ratings": vote.ratings, "flagged": vote.flagged}),
        "strength": vote.strength,
        "quality": vote.quality,
        "skipped": vote.skipped,
        "rationale": readings(vote.rationale) if vote.rationale else None,
        "demonstration": readings(vote.demonstration) if vote.demonstration else None,
    }


def judgement_of(task: Task, body: JudgementBody) -> Judgement:
    """Return what the page said, of candidates by id.

    Raises:
        InputError: a place that is not on the screen.
    """
    k = len(task.display_order)

    def id_at(place: int, field: str) -> str:
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
    """Return a draft in the page's words: one of its own as it is, one that `AssignmentQueue.undo` made of a judgement
    by place."""
    if "tiers" not in draft or draft.get("places", False):
        return dict(draft)
    return dict(draft) | {"places": True, **by_place(task, draft)}


def by_place(task: Task, judgement: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tiers, ratings and flags of a judgement with answers by place on the screen."""
    place = {id: index for index, id in enumerate(task.display_order)} | {task.item.id: PROMPT}
    return {
        "tiers": [[place[id] for id in tier] for tier in judgement["tiers"]],
        "ratings": {str(place[id]): dict(rated) for id, rated in judgement["ratings"].items()},
        "flagged": [place[id] for id in judgement["flagged"]],
    }


class Body(StrictBody):
    token: str = Field(max_length=64)


class TermsBody(StrictBody):
    """`Terms`, as the step said them."""

    version: int
    mode: Literal["work", "review"]
    guidelines: int | None


class VoteBody(Body):
    key: str = Field(min_length=16, max_length=64, pattern=r"^[\w-]+$")
    terms: TermsBody
    judgement: JudgementBody = Field(alias="said")


class DraftBody(Body):
    draft: JudgementBody


class UndoBody(StrictBody):
    seq: int


def person_of(request: Request) -> Person:
    """Return the visitor, as the authentication found."""
    person = request.scope["person"]
    assert person is not None
    return person


ASKING: Any = Depends(person_of)


def place_id(store: Store, person: Person, project: str) -> str:
    """Return what a page calls a person's place in a project. What it keeps in the browser lies under this name, and
    what it sends says it: another's words, or another project's, are never taken for theirs."""
    return sha256(to_canonical_json([store.masked_url, project, person.name]).encode()).hexdigest()[:16]


def routes(store: Store, accounts: bool) -> APIRouter:
    """Return the routes of every project; a request names its own by the header X-Align. Serve a store from one
    process: the queues are made here, each when it is first asked for.

    Args:
        accounts: whether people can log out.
    """
    router = APIRouter(prefix="/api")
    queues: dict[str, AssignmentQueue] = {}
    lock = threading.Lock()

    def queue_of(request: Request, person: Person = ASKING) -> AssignmentQueue:
        """A page of another person or project must keep what it has: 403 says so."""
        place = request.headers.get("x-align", "")
        project = next((name for name in person.roles if place_id(store, person, name) == place), None)
        if project is None:
            raise HTTPException(403, "this is no project of whoever is logged in")
        with lock:
            if project not in queues:
                queues[project] = AssignmentQueue(store, project)
            return queues[project]

    here: Any = Depends(queue_of)

    # What somebody works on

    @router.get("/projects")
    def projects(person: Person = ASKING) -> dict[str, Any]:
        with store.reading() as db:
            titles = {name: settings_of(db, name).title or name for name in person.roles}
        mine = [
            {
                "id": place_id(store, person, name),
                "name": name,
                "title": title,
                "reviews": person.may(name, "reviewer"),
            }
            for name, title in titles.items()
        ]
        return {
            "projects": mine,
            "person": person.name,
            "accounts": accounts,
            "manages": manages(person),
            "words": WORDS,
        }

    @router.get("/project")
    def project(queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        return {
            "id": place_id(store, person, queue.project),
            "votes": queue.recent(person.name),
            "known_guidelines": queue.known_guidelines(person.name),
        }

    @router.get("/guidelines")
    def guidelines(version: int, queue: AssignmentQueue = here) -> dict[str, Any]:
        with store.reading() as db:
            found = guidelines_of(db, queue.project, version)
        known = found is not None
        require(known, "version", version, "there is no such version", "Ask for the one that an item names.")
        return {"version": version, "html": rendered(found[1] if found else "")}

    # Steps: each answer brings what the page shows next

    @router.get("/task")
    def task(queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        return step(queue, person, "work", queue.take(person.name))

    @router.get("/review")
    def review(queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        check_reviewer(person, queue)
        return step(queue, person, "review", queue.take_review(person.name))

    @router.post("/vote")
    def vote(body: VoteBody, queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        held = queue.held(person.name, body.token)
        if held.purpose == "review":
            check_reviewer(person, queue)
        judgement = judgement_of(held, body.judgement)
        terms = Terms(**body.terms.model_dump())
        seq, following = queue.vote(person.name, body.token, body.key, judgement, terms)
        return {"seq": seq, **step(queue, person, mode_of(held.purpose), following)}

    @router.post("/undo")
    def undo(body: UndoBody, queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        task = queue.undo(person.name, body.seq)
        return step(queue, person, mode_of(task.purpose), task)

    # What a page asks of the item on the screen

    @router.post("/draft")
    def draft(body: DraftBody, queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        queue.save_draft(person.name, body.token, {"places": True, **body.draft.model_dump(exclude_defaults=True)})
        return standing(queue, person, body.token)

    @router.post("/renew")
    def renew(body: Body, queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        return standing(queue, person, body.token)

    @router.get("/difference")
    def difference(
        token: str, a: int, b: int, queue: AssignmentQueue = here, person: Person = ASKING
    ) -> dict[str, str]:
        held = queue.held(person.name, token)
        texts = {candidate.id: candidate.text for candidate in held.item.candidates}
        before, after = (held.display_order[place % len(held.display_order)] for place in (a, b))
        return {"html": compared(texts[before], texts[after])}

    return router


def check_reviewer(person: Person, queue: AssignmentQueue) -> None:
    if not person.may(queue.project, "reviewer"):
        raise HTTPException(403, "this is for reviewers and admins of the project")


def standing(queue: AssignmentQueue, person: Person, token: str) -> dict[str, bool]:
    """Return whether an item is still kept for whoever has it on their screen, or was judged by them elsewhere."""
    kept = queue.renew(person.name, token)
    return {"kept": kept, "judged": not kept and queue.is_judged(person.name, token)}


def step(queue: AssignmentQueue, person: Person, mode: str, task: Task | None) -> dict[str, Any]:
    """Return what the page shows next, what it asks, and the terms under which a vote on it is made."""
    progress = queue.progress(person.name, anew=task is None)
    with queue.store.reading() as db:
        terms = terms_now(db, queue.project, mode)
        settings = settings_of(db, queue.project)
    common = {
        "terms": asdict(terms),
        "asked": {
            "title": settings.title or queue.project,
            "attributes": settings.attributes,
            "scale": settings.scale,
            "blurred": settings.blurred,
        },
        "progress": asdict(progress),
    }
    if task is None:
        return {"task": None, "idle": queue.idle(person.name), **common}
    others = {}
    if task.purpose == "review":
        with queue.store.reading() as db:
            others = {"others": [opinion(task, vote) for vote in opinions_of(db, queue.project, task.item.id)]}
    return {"task": item_as_json(task) | others, **common}
