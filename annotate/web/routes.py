"""The JSON routes of the annotation page: leases, votes, undo and drafts. The response to a vote includes the next
item, so that a step takes one request.

The page identifies answers by their position on the screen, 0 to K-1, because an id would reveal which model wrote it.
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
from align.annotate.assignment.leases import AnnotationTask, Terms, get_page_mode, read_opinions, read_terms
from align.annotate.store import Judgement, Store, Vote, replace_unwritable
from align.annotate.store.projects import read_guidelines, read_settings
from align.annotate.web.access import is_manager
from align.annotate.web.markup import render_as_written, render_difference, render_markdown
from align.annotate.web.templating import UI_TEXTS
from align.core.chain import to_canonical_json
from align.core.errors import require

PROMPT = -1
"""Position that stands for the prompt in a list of flagged answers."""


class StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class JudgementBody(StrictBody):
    """The JSON body of a judgement, in which answers are identified by their position on the screen.

    Attributes:
        tiers: best first; empty for a skip.
        strength: how much better the first of two answers' tiers is, 1 to 3; 0 for a tie.
        flagged: positions of harmful answers; -1 for the prompt.
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


def task_to_json(task: AnnotationTask) -> dict[str, Any]:
    """Convert a task to JSON for the page: prompt and answers as harmless HTML, in display order, without origin."""
    by_id = {candidate.id: candidate for candidate in task.item.candidates}
    answers = [by_id[id] for id in task.display_order]
    return {
        "token": task.token,
        "prompt": [{"role": turn.role, **render_text(turn.content)} for turn in task.item.prompt.messages],
        "answers": [
            {**render_text(answer.text), "empty": not answer.text.strip(), "cut": not answer.ended}
            for answer in answers
        ],
        "draft": draft_to_json(task, task.draft),
        "expires_at": task.expires_at,
    }


def render_text(text: str) -> dict[str, str]:
    """Return a text as HTML in two forms: `html`, rendered as Markdown, and `written`, as it is.

    The page shows one of them.
    """
    return {"html": render_markdown(text), "written": render_as_written(text)}


def opinion_to_json(task: AnnotationTask, vote: Vote) -> dict[str, Any]:
    """Convert an annotator's vote on a task's item to JSON for a reviewer.

    Answers are identified by their position on the screen, and texts are HTML.
    """
    return {
        "who": vote.annotator,
        **convert_ids_to_positions(task, {"tiers": vote.tiers, "ratings": vote.ratings, "flagged": vote.flagged}),
        "strength": vote.strength,
        "quality": vote.quality,
        "skipped": vote.skipped,
        "rationale": render_text(vote.rationale) if vote.rationale else None,
        "demonstration": render_text(vote.demonstration) if vote.demonstration else None,
    }


def parse_judgement(task: AnnotationTask, body: JudgementBody) -> Judgement:
    """Convert the JSON body of a judgement to a Judgement, with screen positions replaced by candidate ids.

    Raises:
        InputError: a position that is not on the screen.
    """
    k = len(task.display_order)

    def find_candidate_id(position: int, field: str) -> str:
        require(0 <= position < k, field, position, f"there are {k} answers", f"Name a position from 0 to {k - 1}.")
        return task.display_order[position]

    positions = {name: int(name) if re.fullmatch("[0-9]", name) else k for name in body.ratings}
    return Judgement(
        tiers=tuple(tuple(find_candidate_id(position, "tiers") for position in tier) for tier in body.tiers),
        strength=body.strength if k == 2 else None,
        quality=body.quality,
        ratings={find_candidate_id(positions[name], "ratings"): rated for name, rated in body.ratings.items()},
        flagged=tuple(
            task.item.id if position == PROMPT else find_candidate_id(position, "flagged") for position in body.flagged
        ),
        skipped=body.skipped,
        seconds=body.seconds,
        rationale=replace_unwritable(body.rationale),
        demonstration=replace_unwritable(body.demonstration),
    )


def draft_to_json(task: AnnotationTask, draft: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved draft as JSON for the page, with answers identified by their position on the screen.

    The page's own drafts are returned unchanged. In a judgement saved by `AssignmentQueue.undo`, candidate ids are
    replaced by positions on the screen.
    """
    if "tiers" not in draft or draft.get("places", False):
        return dict(draft)
    return dict(draft) | {"places": True, **convert_ids_to_positions(task, draft)}


def convert_ids_to_positions(task: AnnotationTask, judgement: Mapping[str, Any]) -> dict[str, Any]:
    """Return a judgement's tiers, ratings and flags, with candidate ids replaced by positions on the screen, from 0."""
    position_of = {id: index for index, id in enumerate(task.display_order)} | {task.item.id: PROMPT}
    return {
        "tiers": [[position_of[id] for id in tier] for tier in judgement["tiers"]],
        "ratings": {str(position_of[id]): dict(rated) for id, rated in judgement["ratings"].items()},
        "flagged": [position_of[id] for id in judgement["flagged"]],
    }


class TokenBody(StrictBody):
    token: str = Field(max_length=64)


class TermsBody(StrictBody):
    """The JSON body of a vote's terms: the page's mode, and the versions of settings and guidelines that applied."""

    version: int
    mode: Literal["work", "review"]
    guidelines: int | None


class VoteBody(TokenBody):
    key: str = Field(min_length=16, max_length=64, pattern=r"^[\w-]+$")
    terms: TermsBody
    judgement: JudgementBody = Field(alias="said")


class DraftBody(TokenBody):
    draft: JudgementBody


class UndoBody(StrictBody):
    seq: int


def get_visitor(request: Request) -> Person:
    """Return the person that the middleware authenticated for a request."""
    person = request.scope["person"]
    assert person is not None
    return person


PERSON: Any = Depends(get_visitor)


def make_membership_id(store: Store, person: Person, project: str) -> str:
    """Return an id of a person's membership in a project: a hash of the store, the project and the person's name.

    The page stores data in the browser under this id and sends it with every request, so that data of another person or
    project are never mixed in.
    """
    return sha256(to_canonical_json([store.masked_url, project, person.name]).encode()).hexdigest()[:16]


def build_routes(store: Store, has_accounts: bool) -> APIRouter:
    """Return the JSON routes of the annotation page for all projects: tasks, votes, undo, drafts and guidelines.

    A request names its project by the header X-Align.

    The queues are created here on first use, so serve a store from one process.

    Args:
        has_accounts: whether people have accounts, and so can log out.
    """
    router = APIRouter(prefix="/api")
    queues: dict[str, AssignmentQueue] = {}
    lock = threading.Lock()

    def find_queue(request: Request, person: Person = PERSON) -> AssignmentQueue:
        """Return the queue of the project in the header X-Align, or raise HTTP 403 if the visitor has no role in it."""
        membership_id = request.headers.get("x-align", "")
        names = (name for name in person.roles if make_membership_id(store, person, name) == membership_id)
        project = next(names, None)
        if project is None:
            raise HTTPException(403, "the person who is logged in has no such project")
        with lock:
            if project not in queues:
                queues[project] = AssignmentQueue(store, project)
            return queues[project]

    queue_dependency: Any = Depends(find_queue)

    # Projects and guidelines

    @router.get("/projects")
    def list_projects(person: Person = PERSON) -> dict[str, Any]:
        with store.reading() as db:
            titles = {name: read_settings(db, name).title or name for name in person.roles}
        own_projects = [
            {
                "id": make_membership_id(store, person, name),
                "name": name,
                "title": title,
                "reviews": person.has_role(name, "reviewer"),
            }
            for name, title in titles.items()
        ]
        return {
            "projects": own_projects,
            "person": person.name,
            "accounts": has_accounts,
            "manages": is_manager(person),
            "words": UI_TEXTS,
        }

    @router.get("/project")
    def open_project(queue: AssignmentQueue = queue_dependency, person: Person = PERSON) -> dict[str, Any]:
        return {
            "id": make_membership_id(store, person, queue.project),
            "votes": queue.list_recent_votes(person.name),
            "known_guidelines": queue.read_known_guidelines(person.name),
        }

    @router.get("/guidelines")
    def get_guidelines(version: int, queue: AssignmentQueue = queue_dependency) -> dict[str, Any]:
        with store.reading() as db:
            published = read_guidelines(db, queue.project, version)
        is_known_version = published is not None
        require(is_known_version, "version", version, "there is no such version", "Ask for the one that an item names.")
        return {"version": version, "html": render_markdown(published.text if published else "")}

    # Steps: each response includes the next item

    @router.get("/task")
    def take_task(queue: AssignmentQueue = queue_dependency, person: Person = PERSON) -> dict[str, Any]:
        return build_step(queue, person, "work", queue.take(person.name))

    @router.get("/review")
    def take_review(queue: AssignmentQueue = queue_dependency, person: Person = PERSON) -> dict[str, Any]:
        check_reviewer(person, queue)
        return build_step(queue, person, "review", queue.take_review(person.name))

    @router.post("/vote")
    def record_vote(
        body: VoteBody, queue: AssignmentQueue = queue_dependency, person: Person = PERSON
    ) -> dict[str, Any]:
        task = queue.get_task(person.name, body.token)
        if task.purpose == "review":
            check_reviewer(person, queue)
        judgement = parse_judgement(task, body.judgement)
        terms = Terms(**body.terms.model_dump())
        seq, next_task = queue.vote(person.name, body.token, body.key, judgement, terms)
        return {"seq": seq, **build_step(queue, person, get_page_mode(task.purpose), next_task)}

    @router.post("/undo")
    def undo_vote(body: UndoBody, queue: AssignmentQueue = queue_dependency, person: Person = PERSON) -> dict[str, Any]:
        task = queue.undo(person.name, body.seq)
        return build_step(queue, person, get_page_mode(task.purpose), task)

    # Requests about the item on the screen

    @router.post("/draft")
    def save_draft(
        body: DraftBody, queue: AssignmentQueue = queue_dependency, person: Person = PERSON
    ) -> dict[str, Any]:
        queue.save_draft(person.name, body.token, {"places": True, **body.draft.model_dump(exclude_defaults=True)})
        return renew_lease(queue, person, body.token)

    @router.post("/renew")
    def extend_lease(
        body: TokenBody, queue: AssignmentQueue = queue_dependency, person: Person = PERSON
    ) -> dict[str, Any]:
        return renew_lease(queue, person, body.token)

    @router.get("/difference")
    def compare_answers(
        token: str, a: int, b: int, queue: AssignmentQueue = queue_dependency, person: Person = PERSON
    ) -> dict[str, str]:
        task = queue.get_task(person.name, token)
        texts = {candidate.id: candidate.text for candidate in task.item.candidates}
        first_id, second_id = (task.display_order[position % len(task.display_order)] for position in (a, b))
        return {"html": render_difference(texts[first_id], texts[second_id])}

    return router


def check_reviewer(person: Person, queue: AssignmentQueue) -> None:
    if not person.has_role(queue.project, "reviewer"):
        raise HTTPException(403, "this is for reviewers and admins of the project")


def renew_lease(queue: AssignmentQueue, person: Person, token: str) -> dict[str, bool]:
    """Extend a person's lease of an item, and return whether they still have it (`kept`).

    If not, `judged` is whether they have judged the item in another window.
    """
    is_kept = queue.renew(person.name, token)
    return {"kept": is_kept, "judged": not is_kept and queue.is_judged(person.name, token)}


def build_step(queue: AssignmentQueue, person: Person, mode: str, task: AnnotationTask | None) -> dict[str, Any]:
    """Return the JSON for the page's next step: the task, its questions, the terms of a vote on it, and the progress.

    Without a task it has the reason (`idle`). A review has the annotators' votes (`others`).
    """
    progress = queue.read_progress(person.name, recount_totals=task is None)
    with queue.store.reading() as db:
        terms = read_terms(db, queue.project, mode)
        settings = read_settings(db, queue.project)
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
        return {"task": None, "idle": queue.explain_idle(person.name), **common}
    opinions = {}
    if task.purpose == "review":
        with queue.store.reading() as db:
            opinions = {
                "others": [opinion_to_json(task, vote) for vote in read_opinions(db, queue.project, task.item.id)]
            }
    return {"task": task_to_json(task) | opinions, **common}
