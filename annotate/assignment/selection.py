"""Which item somebody is given next. Functions of an open connection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, exists, select

from align.annotate.assignment.orders import chance
from align.annotate.store import Settings
from align.annotate.store.queries import stands
from align.annotate.store.tables import leases, ledger, work

REPEAT_AFTER = 10
"""Other votes that lie between a vote and its repeat, at least."""
REVIEWS_LOOKED_AT = 50


def choose(
    db: Connection, project: str, who: str, number: int, settings: Settings
) -> tuple[str, str | None, tuple[str, ...]]:
    """Purpose and item of the annotator's next lease, and the order of a repeat; no item where nothing is left."""
    if chance(settings.gold_share, who, number, "gold"):
        gold = db.execute(fresh(project, who).where(work.c.gold).order_by(work.c.shuffle).limit(1)).scalar()
        if gold is not None:
            return "gold", gold, ()
    if chance(settings.repeat_share, who, number, "repeat"):
        earlier = to_repeat(db, project, who)
        if earlier is not None:
            return "repeat", earlier.item, tuple(reversed(json.loads(earlier.shown)))
    order = (work.c.priority.desc(), work.c.shuffle) if settings.order == "priority" else (work.c.shuffle,)
    item = None
    for passed in (("open", "judged", "returned"), ("open", "judged")):  # what they gave back comes last
        if item is None:
            left = fresh(project, who, passed).where(work.c.wanted > work.c.judged + work.c.leased)
            item = db.execute(left.order_by(*order).limit(1)).scalar()
    return "work", item, ()


def choose_review(db: Connection, project: str, contested: Sequence[str]) -> str | None:
    """The first of these items that no reviewer has settled or holds; None where there is none."""
    given = (leases.c.project == project, leases.c.purpose == "review")
    taken = set(db.execute(select(leases.c.item).where(*given, leases.c.state.in_(("open", "judged")))).scalars())
    left = [item for item in contested if item not in taken][:REVIEWS_LOOKED_AT]
    there = (work.c.project == project, work.c.item.in_(left))  # not erased since
    known = set(db.execute(select(work.c.item).where(*there)).scalars())
    return next((item for item in left if item in known), None)


def fresh(project: str, who: str, passed: Sequence[str] = ("open", "judged")) -> Select[Any]:
    """Items that the annotator has not judged or skipped, nor has a lease of in one of these states."""
    held = (leases.c.project == project, leases.c.item == work.c.item, leases.c.annotator == who)
    theirs = exists().where(*held, leases.c.state.in_(passed))
    judged = exists().where(stands(project), ledger.c.item == work.c.item, ledger.c.annotator == who)
    return select(work.c.item).where(work.c.project == project, ~theirs, ~judged)


def to_repeat(db: Connection, project: str, who: str) -> Row[Any] | None:
    """The annotator's first ranking that lies far enough back and has not been repeated."""
    again = leases.alias("again")
    repeated = exists().where(
        again.c.project == project, again.c.annotator == who, again.c.item == leases.c.item,
        again.c.purpose == "repeat", again.c.state.in_(("open", "judged")),
    )  # fmt: skip
    ranked = exists().where(stands(project), ledger.c.seq == leases.c.vote, ledger.c.kind == "ranking")
    mine = (leases.c.project == project, leases.c.annotator == who, leases.c.state == "judged")
    newest = select(leases.c.vote).where(*mine).order_by(leases.c.vote.desc())
    far = db.execute(newest.offset(REPEAT_AFTER).limit(1)).scalar()
    due = (leases.c.purpose == "work", leases.c.vote <= (0 if far is None else far))
    return db.execute(select(leases).where(*mine, *due, ranked, ~repeated).order_by(leases.c.vote).limit(1)).first()
