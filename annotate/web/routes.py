"""Leases, votes, undo and drafts as JSON. A vote's answer brings the next item, so that one request is one step."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field

from annotate.assignment import Desk, Task
from annotate.store.ledger import canonical
from annotate.store.projects import guidelines_of, settings_of
from annotate.web.cards import Said, card, judgement_of
from annotate.web.markup import compared, rendered
from annotate.web.words import WORDS


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    token: str = Field(max_length=64)


class VoteBody(Body):
    key: str = Field(min_length=16, max_length=64, pattern=r"^[\w-]+$")
    said: Said


class DraftBody(Body):
    draft: Said


class UndoBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    seq: int


def routes(desk: Desk, who: Callable[..., str]) -> APIRouter:
    """The routes of one project.

    Args:
        who: a FastAPI dependency: the identity of whoever sent a request, which has been let in already.
    """
    id = sha256(canonical([desk.store.shown, desk.project]).encode()).hexdigest()[:16]

    def meant_for_us(request: Request) -> None:
        """A page of another project, which was served here before, must keep what it has: 503 says so."""
        if request.method == "POST" and request.headers["x-align"] != id:
            raise HTTPException(503, "another project is served here now")

    router, annotator = APIRouter(prefix="/api", dependencies=[Depends(meant_for_us)]), Depends(who)

    def step(name: str, task: Task | None) -> dict[str, Any]:
        """What the page shows next."""
        done = desk.progress(name)
        progress = {"mine": done.mine, "quota": done.quota, "done": done.done, "wanted": done.wanted}
        if task is None:
            return {"task": None, "idle": desk.idle(name), "progress": progress}
        return {"task": card(task), "progress": progress}

    @router.get("/project")
    def project() -> dict[str, Any]:
        with desk.store.reading() as db:
            settings, guidelines = settings_of(db, desk.project), guidelines_of(db, desk.project)
        return {
            "id": id,
            "title": settings.title or desk.project,
            "attributes": settings.attributes,
            "scale": settings.scale,
            "blurred": settings.blurred,
            "guidelines": None if guidelines is None else {"version": guidelines[0], "html": rendered(guidelines[1])},
            "words": WORDS,
        }

    @router.get("/task")
    def task(name: str = annotator) -> dict[str, Any]:
        return step(name, desk.take(name))

    @router.post("/vote")
    def vote(body: VoteBody, name: str = annotator) -> dict[str, Any]:
        judgement = judgement_of(desk.held(name, body.token), body.said)
        seq, following = desk.vote(name, body.token, body.key, judgement)
        return {"seq": seq, **step(name, following)}

    @router.post("/undo")
    def undo(body: UndoBody, name: str = annotator) -> dict[str, Any]:
        return step(name, desk.undo(name, body.seq))

    @router.post("/draft")
    def draft(body: DraftBody, name: str = annotator) -> dict[str, Any]:
        desk.save_draft(name, body.token, {"places": True, **body.draft.model_dump(exclude_defaults=True)})
        return {"kept": desk.renew(name, body.token)}

    @router.post("/renew")
    def renew(body: Body, name: str = annotator) -> dict[str, Any]:
        return {"kept": desk.renew(name, body.token)}

    @router.get("/difference")
    def difference(token: str, a: int, b: int, name: str = annotator) -> dict[str, str]:
        held = desk.held(name, token)
        texts = {candidate.id: candidate.text for candidate in held.item.candidates}
        before, after = (held.shown[place % len(held.shown)] for place in (a, b))
        return {"html": compared(texts[before], texts[after])}

    return router
