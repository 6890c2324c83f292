"""How far an annotator and their project are, and why somebody has nothing to do. Functions of an open connection."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sqlalchemy import Connection, case, func, select

from align.annotate.assignment.selection import fresh
from align.annotate.store.projects import settings_of, state_of
from align.annotate.store.queries import VOTES, stands
from align.annotate.store.tables import ledger, work


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


def judged_by(db: Connection, project: str, who: str) -> int:
    """The annotator's standing rankings."""
    mine = (stands(project), ledger.c.kind == "ranking", ledger.c.annotator == who)
    return db.execute(select(func.count()).select_from(ledger).where(*mine)).scalar_one()


def sums(db: Connection, project: str) -> tuple[int, int]:
    """The project's rankings that are done, and those that are wanted: a look at every item."""
    judged = case((work.c.judged < work.c.wanted, work.c.judged), else_=work.c.wanted)
    query = select(func.coalesce(func.sum(judged), 0), func.coalesce(func.sum(work.c.wanted), 0))
    done, wanted = db.execute(query.where(work.c.project == project)).one()
    return int(done), int(wanted)


def guidelines_at_last_vote(db: Connection, project: str, who: str) -> int | None:
    """As `AssignmentQueue.known_guidelines` says it."""
    mine = (ledger.c.project == project, ledger.c.kind.in_(VOTES), ledger.c.annotator == who)
    payload = db.execute(select(ledger.c.payload).where(*mine).order_by(ledger.c.seq.desc()).limit(1)).scalar()
    version = json.loads(payload)["guideline_version"] if payload else ""
    return int(version) if version else None


def why_idle(db: Connection, project: str, who: str) -> str:
    """As `AssignmentQueue.idle` says it."""
    state, settings = state_of(db, project), settings_of(db, project)
    if state != "open":
        return state
    if settings.quota and judged_by(db, project, who) >= settings.quota:
        return "quota"
    held = fresh(project, who).where(work.c.leased > 0, work.c.judged < work.c.wanted).limit(1)
    return "done" if db.execute(held).first() is None else "held"
