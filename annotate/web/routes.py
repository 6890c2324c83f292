"""Leases, votes, undo and drafts as JSON. A vote's answer brings the next item, so that one request is one step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from align.annotate.accounts import Person
from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.reviewing import opinions_of
from align.annotate.assignment.tasks import Task
from align.annotate.assignment.terms import Terms, mode_of, terms_now
from align.annotate.store.projects import guidelines_of, settings_of
from align.annotate.web.access import manages
from align.annotate.web.item_view import JudgementBody, item_as_json, judgement_of, opinion
from align.annotate.web.markup import compared, rendered
from align.annotate.web.queues import AssignmentQueues
from align.annotate.web.words import WORDS
from align.core.errors import require


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    token: str = Field(max_length=64)


class TermsBody(BaseModel):
    """`Terms`, as the step said them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    mode: Literal["work", "review"]
    guidelines: int | None


class VoteBody(Body):
    key: str = Field(min_length=16, max_length=64, pattern=r"^[\w-]+$")
    terms: TermsBody
    judgement: JudgementBody = Field(alias="said")


class DraftBody(Body):
    draft: JudgementBody


class UndoBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    seq: int


def person_of(request: Request) -> Person:
    """Return the visitor, as the authentication found."""
    person = request.scope["person"]
    assert person is not None
    return person


ASKING: Any = Depends(person_of)


def routes(queues: AssignmentQueues, accounts: bool) -> APIRouter:
    """The routes of every project; a request names its own by the header X-Align.

    Args:
        accounts: whether people can log out.
    """
    router = APIRouter(prefix="/api")

    def queue_of(request: Request, person: Person = ASKING) -> AssignmentQueue:
        """A page of another person or project must keep what it has: 403 says so."""
        queue = queues.named(person, request.headers.get("x-align", ""))
        if queue is None:
            raise HTTPException(403, "this is no project of whoever is logged in")
        return queue

    add_projects(router, queues, Depends(queue_of), accounts)
    add_steps(router, Depends(queue_of))
    add_drafts(router, Depends(queue_of))
    return router


def add_projects(router: APIRouter, queues: AssignmentQueues, here: Any, accounts: bool) -> None:
    """What somebody works on."""

    @router.get("/projects")
    def projects(person: Person = ASKING) -> dict[str, Any]:
        with queues.store.reading() as db:
            titles = {name: settings_of(db, name).title or name for name in person.roles}
        mine = [
            {"id": queues.id(person, name), "name": name, "title": title, "reviews": person.may(name, "reviewer")}
            for name, title in titles.items()
        ]
        return {
            "projects": mine, "person": person.name, "accounts": accounts, "manages": manages(person), "words": WORDS
        }  # fmt: skip

    @router.get("/project")
    def project(queue: AssignmentQueue = here, person: Person = ASKING) -> dict[str, Any]:
        known = queue.known_guidelines(person.name)
        return {"id": queues.id(person, queue.project), "votes": queue.recent(person.name), "known_guidelines": known}

    @router.get("/guidelines")
    def guidelines(version: int, queue: AssignmentQueue = here) -> dict[str, Any]:
        with queue.store.reading() as db:
            found = guidelines_of(db, queue.project, version)
        known = found is not None
        require(known, "version", version, "there is no such version", "Ask for the one that an item names.")
        return {"version": version, "html": rendered(found[1] if found else "")}


def add_steps(router: APIRouter, here: Any) -> None:
    """Each answer brings what the page shows next."""

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


def add_drafts(router: APIRouter, here: Any) -> None:
    """What a page asks of the item on the screen."""

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


def check_reviewer(person: Person, queue: AssignmentQueue) -> None:
    if not person.may(queue.project, "reviewer"):
        raise HTTPException(403, "this is for reviewers and admins of the project")


def standing(queue: AssignmentQueue, person: Person, token: str) -> dict[str, bool]:
    """Whether an item is still kept for whoever has it on their screen, or was judged by them elsewhere."""
    kept = queue.renew(person.name, token)
    return {"kept": kept, "judged": not kept and queue.is_judged(person.name, token)}


def step(queue: AssignmentQueue, person: Person, mode: str, task: Task | None) -> dict[str, Any]:
    """What the page shows next, what it asks, and the terms under which a vote on it is made."""
    done = queue.progress(person.name, anew=task is None)
    with queue.store.reading() as db:
        terms, settings = terms_now(db, queue.project, mode)
    common = {
        "terms": asdict(terms),
        "asked": {
            "title": settings.title or queue.project, "attributes": settings.attributes, "scale": settings.scale,
            "blurred": settings.blurred,
        },
        "progress": {"mine": done.mine, "quota": done.quota, "done": done.done, "wanted": done.wanted},
    }  # fmt: skip
    if task is None:
        return {"task": None, "idle": queue.idle(person.name), **common}
    others = {}
    if task.purpose == "review":
        with queue.store.reading() as db:
            others = {"others": [opinion(task, vote) for vote in opinions_of(db, queue.project, task.item.id)]}
    return {"task": item_as_json(task) | others, **common}
