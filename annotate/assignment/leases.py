"""Leases: an item that one annotator holds until they vote, return it, or show no sign of life. Functions of an open
connection; `now` is in seconds since 1970."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, insert, select, update

from align.annotate.assignment.orders import counterbalanced_order, turned
from align.annotate.store.items import one
from align.annotate.store.projects import settings_of
from align.annotate.store.queries import count_work
from align.annotate.store.tables import leases, work
from align.core.chain import canonical
from align.core.errors import InputError


def lease_of(db: Connection, project: str, who: str, token: str) -> Row[Any]:
    """The annotator's lease of this token. Raises: InputError: there is none."""
    mine = (leases.c.project == project, leases.c.token == token, leases.c.annotator == who)
    lease = db.execute(select(leases).where(*mine)).first()
    if lease is None:
        raise InputError("token", token, "you hold no such item", "Ask for the next one.")
    return lease


def of_item(project: str, who: str, item: str, purpose: str) -> ColumnElement[bool]:
    """The annotator's leases of an item for a purpose."""
    theirs = (leases.c.annotator == who) & (leases.c.item == item) & (leases.c.purpose == purpose)
    return (leases.c.project == project) & theirs


def open_lease(db: Connection, project: str, who: str, which: ColumnElement[bool]) -> Row[Any] | None:
    """The first that the annotator holds, overdue or not: nobody else has asked for it."""
    open_ones = (leases.c.project == project, leases.c.annotator == who, leases.c.state == "open")
    return db.execute(select(leases).where(*open_ones, which).order_by(leases.c.number).limit(1)).first()


def next_number(db: Connection, project: str, who: str) -> int:
    """Of the annotator's next lease."""
    mine = (leases.c.project == project, leases.c.annotator == who)
    last = db.execute(select(func.max(leases.c.number)).where(*mine)).scalar()
    return 0 if last is None else last + 1


def grant(
    db: Connection,
    project: str,
    who: str,
    number: int,
    purpose: str,
    item: str,
    display_order: tuple[str, ...],
    now: float,
) -> Row[Any]:
    """A new lease of an item.

    Args:
        display_order: of its candidates on the screen; empty: the annotator's next one, or the item's where the
            project says so.

    Raises:
        InputError: the item was erased.
    """
    ids = [candidate.id for candidate in one(db, project, item).candidates]
    alike = (leases.c.project == project, leases.c.annotator == who, leases.c.k == len(ids))
    last = db.execute(select(func.max(leases.c.turn)).where(*alike)).scalar()
    turn = -1 if last is None else last
    turn += purpose != "repeat"  # whose order is given: it takes no turn
    if purpose == "work":  # a gold item wants nobody, and would stand the same way before everyone
        display_order = order_of_item(db, project, item, ids)
    row = {
        "token": secrets.token_urlsafe(24),
        "project": project,
        "annotator": who,
        "number": number,
        "item": item,
        "purpose": purpose,
        "shown": canonical(list(display_order or counterbalanced_order(ids, who, turn))),
        "k": len(ids),
        "turn": turn,
        "state": "open",
        "granted_at": now,
        "vote": None,
        "expires_at": expiry(db, project, now),
    }
    db.execute(insert(leases), row)
    if purpose == "work":
        count_work(db, project, item, leased=1)
    return lease_of(db, project, who, row["token"])


def order_of_item(db: Connection, project: str, item: str, ids: Sequence[str]) -> tuple[str, ...]:
    """In which order an item's candidates stand for whoever judges it next, where the project turns them by item; empty
    where it does not.

    Args:
        ids: of the candidates, by position.
    """
    if not settings_of(db, project).turned_by_item:
        return ()
    counters = select(work.c.judged + work.c.leased).where(work.c.project == project, work.c.item == item)
    return turned(ids, db.execute(counters).scalar_one())  # those who judged it, and those who are at it


def prolong(db: Connection, lease: Row[Any], now: float) -> None:
    until = expiry(db, lease.project, now)
    db.execute(update(leases).where(leases.c.token == lease.token).values(expires_at=until))


def open_again(db: Connection, lease: Row[Any], now: float) -> None:
    db.execute(update(leases).where(leases.c.token == lease.token).values(state="open", vote=None))
    prolong(db, lease, now)
    if lease.purpose == "work":
        count_work(db, lease.project, lease.item, leased=1)


def wanted_again(db: Connection, lease: Row[Any]) -> bool:
    """Whether an item that went back from a lease still wants somebody, and its holder has not taken it anew."""
    place = (work.c.project == lease.project, work.c.item == lease.item)
    left = db.execute(select(work.c.wanted - work.c.judged - work.c.leased).where(*place)).scalar()
    mine = of_item(lease.project, lease.annotator, lease.item, lease.purpose)
    anew = db.execute(select(leases.c.token).where(mine, leases.c.state.in_(("open", "judged")))).first()
    return anew is None and left is not None and (lease.purpose != "work" or left > 0)


def expiry(db: Connection, project: str, now: float) -> float:
    """When a lease ends that is given or prolonged now. Raises: InputError: unknown project."""
    return now + 60 * settings_of(db, project).lease_minutes
