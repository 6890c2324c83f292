"""What the store asks of its tables, and the checks that say no: functions of an open connection."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, exists, insert, select, update

from align.annotate.store.ledger import Entry, entry_hash
from align.annotate.store.records import Judgement, shuffle_of
from align.annotate.store.tables import annotators, leases, ledger, remarks, work
from align.core.chain import GENESIS, Head, canonical, salted_digest
from align.core.errors import InputError

VOTES = ("ranking", "skip")
"""Kinds of the ledger's rows that say what an annotator thought of an item."""


def stands(project: str, row: Any = ledger) -> ColumnElement[bool]:
    """A judgement of this project that no retraction takes back."""
    retraction = ledger.alias("retraction")
    return (row.c.project == project) & row.c.kind.in_(VOTES) & ~exists().where(retraction.c.retracts == row.c.seq)


def head_of(connection: Connection, project: str | None = None) -> Head:
    query = select(ledger.c.seq, ledger.c.hash).order_by(ledger.c.seq.desc()).limit(1)
    row = connection.execute(query if project is None else query.where(ledger.c.project == project)).first()
    return Head(0, GENESIS) if row is None else Head(row.seq, row.hash)


def head_of_votes(connection: Connection, project: str) -> Head:
    """The last row of a project that changes which votes stand; `Head(0, GENESIS)` where there is none. What only
    changes the settings, the guidelines or the items is none."""
    which = ledger.c.kind.in_((*VOTES, "retraction", "erasure"))
    mine = select(ledger.c.seq, ledger.c.hash).where(ledger.c.project == project, which)
    row = connection.execute(mine.order_by(ledger.c.seq.desc()).limit(1)).first()
    return Head(0, GENESIS) if row is None else Head(row.seq, row.hash)


def append(connection: Connection, project: str, kind: str, payload: dict[str, Any], **columns: Any) -> int:
    """Writes the ledger's next row and returns its seq. `columns`: any of item, annotator, key, retracts."""
    head = head_of(connection)
    columns = {"item": None, "annotator": None, "key": None, "retracts": None, **columns}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = canonical(payload)
    entry = Entry(head.seq + 1, project, kind, created_at=now, payload=text, prev_hash=head.hash, **columns)
    connection.execute(insert(ledger), asdict(replace(entry, hash=entry_hash(entry))))
    return entry.seq


def row_by_key(connection: Connection, project: str, kind: str, key: str) -> Row[Any] | None:
    """The row that an idempotency key already wrote."""
    where = (ledger.c.project == project, ledger.c.kind == kind, ledger.c.key == key)
    return connection.execute(select(ledger).where(*where)).first()


def annotator_of(connection: Connection, project: str, identity: str) -> Row[Any] | None:
    where = (annotators.c.project == project, annotators.c.identity == identity)
    return connection.execute(select(annotators).where(*where)).first()


def new_annotator(connection: Connection, project: str, identity: str) -> Row[Any]:
    """A new annotator, under a random pseudonym."""
    names = {"pseudonym": f"a{secrets.token_hex(6)}", "salt": secrets.token_hex(16)}
    connection.execute(insert(annotators), {"project": project, "identity": identity, **names})
    mine = (annotators.c.project == project, annotators.c.pseudonym == names["pseudonym"])
    return connection.execute(select(annotators).where(*mine)).one()


def erasure_of(connection: Connection, project: str, item: str) -> int | None:
    """The tombstone of an item, or of its project, if it was erased."""
    where = (ledger.c.project == project, ledger.c.kind == "erasure", ledger.c.item == item)
    return connection.execute(select(ledger.c.seq).where(*where)).scalar() or project_erasure(connection, project)


def project_erasure(connection: Connection, project: str) -> int | None:
    """The tombstone of a project, if it was erased."""
    whole = (ledger.c.kind == "erasure", ledger.c.item.is_(None), ledger.c.annotator.is_(None))
    return connection.execute(select(ledger.c.seq).where(ledger.c.project == project, *whole)).scalar()


def check_project(connection: Connection, project: str) -> None:
    if connection.execute(select(ledger.c.seq).where(ledger.c.project == project).limit(1)).first() is None:
        known = known_projects(connection)
        remedy = f"It holds {', '.join(known)}." if known else "Fill it first with stage=sample."
        raise InputError("project", project, "the store has no such project", remedy)


def known_projects(connection: Connection) -> list[str]:
    return list(connection.execute(select(ledger.c.project).distinct().order_by(ledger.c.project)).scalars())


def check_item(connection: Connection, project: str, item: str) -> None:
    where = (ledger.c.project == project, ledger.c.kind == "candidates", ledger.c.item == item)
    if connection.execute(select(ledger.c.seq).where(*where)).first() is None:
        check_project(connection, project)
        raise InputError("item", item, f"project {project} has no such item", "Take an id that the store gave.")


def same_vote(connection: Connection, row: Row[Any], item: str, annotator: str, judgement: Judgement) -> bool:
    """Whether a row of the ledger is this judgement; of a remark that was erased since, any text will do."""
    kept = json.loads(row.payload)
    digest, _ = kept.pop("remark", ""), kept.pop("annotator_digest", None)
    mine = (remarks.c.project == row.project, remarks.c.seq == row.seq)
    salt = connection.execute(select(remarks.c.salt).where(*mine)).scalar()
    remark = judgement.remark()
    if bool(remark) != bool(digest) or (salt is not None and salted_digest(salt, remark) != digest):
        return False
    given = json.loads(canonical(judgement.payload()))
    return (row.item, row.annotator, kept) == (item, annotator, given)


def remark_of(connection: Connection, project: str, seq: int) -> str | None:
    """What goes with a vote, as canonical JSON."""
    mine = (remarks.c.project == project, remarks.c.seq == seq)
    return connection.execute(select(remarks.c.content).where(*mine)).scalar()


# The work that is left


def counts(judgement: Judgement) -> bool:
    """Whether it is one of those that the project asked for of an item."""
    return judgement.kind == "ranking" and judgement.source == "human" and judgement.purpose == "work"


def work_row(project: str, item: str, priority: float) -> dict[str, Any]:
    counters = {"wanted": 0, "judged": 0, "leased": 0, "gold": False}
    return {"project": project, "item": item, "shuffle": shuffle_of(item), "priority": priority, **counters}


def is_gold(connection: Connection, project: str, item: str) -> bool:
    found = select(work.c.gold).where(work.c.project == project, work.c.item == item)
    return bool(connection.execute(found).scalar())


def set_priority(connection: Connection, project: str, item: str, priority: float) -> None:
    mine = (work.c.project == project, work.c.item == item, work.c.priority != priority)
    connection.execute(update(work).where(*mine).values(priority=priority))


def count_work(connection: Connection, project: str, item: str, judged: int = 0, leased: int = 0) -> None:
    """Adds to the counters of an item; one that was erased has none."""
    added = {"judged": work.c.judged + judged, "leased": work.c.leased + leased}
    connection.execute(update(work).where(work.c.project == project, work.c.item == item).values(added))


def close_leases(connection: Connection, project: str, which: ColumnElement[bool], state: str = "expired") -> None:
    """Takes back the project's open leases of which `which` is true."""
    mine = (leases.c.project == project, leases.c.state == "open", which)
    closed = update(leases).where(*mine).values(state=state).returning(leases.c.item, leases.c.purpose)
    for row in connection.execute(closed).all():
        if row.purpose == "work":
            count_work(connection, project, row.item, leased=-1)
