"""The ledger's rows, which are links of a chain of hashes (`align.core.chain`), and what is asked of them and of the
tables beside it: functions of an open connection.

A cut tail of the ledger shows only against a head noted elsewhere, which is why a reward run records it.

Rows never hold a text or a name, only `sha256(salt, content)`. Content and salt lie in erasable tables: once both
are gone the digest can neither be reversed nor confirmed by guessing, and the chain still verifies.
"""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, exists, insert, select, update

from align.annotate.store.records import Judgement
from align.annotate.store.tables import annotators, leases, ledger, remarks, work
from align.core.chain import GENESIS, ChainHead, hash_link, to_canonical_json
from align.core.errors import InputError

VOTES = ("ranking", "skip")
"""Kinds of the ledger's rows that say what an annotator thought of an item."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the ledger.

    Attributes:
        seq: 1, 2, 3, … over the whole store, without gaps.
        project: whose row it is.
        kind: `candidates`, `ranking`, `skip`, `retraction`, `settings`, `guidelines` or `erasure`.
        item: the item concerned; None where an annotator was erased.
        annotator: the pseudonym concerned; None where there is none.
        key: the idempotency key, unique within project and kind; None where the act is idempotent by itself.
        retracts: the ranking that a retraction takes back; None elsewhere.
        created_at: UTC, ISO 8601.
        payload: canonical JSON, kept as the very text that was hashed.
        prev_hash: hash of row `seq - 1`, or `GENESIS`.
        hash: of all the above.
    """

    seq: int
    project: str
    kind: str
    item: str | None
    annotator: str | None
    key: str | None
    retracts: int | None
    created_at: str
    payload: str
    prev_hash: str
    hash: str = ""

    @property
    def hashed(self) -> tuple[Any, ...]:
        """See `align.core.chain.Link`."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in ("prev_hash", "hash"))


def append(connection: Connection, project: str, kind: str, payload: dict[str, Any], **columns: Any) -> int:
    """Write the ledger's next row and return its seq. `columns`: any of item, annotator, key, retracts."""
    head = head_of(connection)
    columns = {"item": None, "annotator": None, "key": None, "retracts": None, **columns}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = to_canonical_json(payload)
    entry = Entry(head.seq + 1, project, kind, created_at=now, payload=text, prev_hash=head.hash, **columns)
    connection.execute(insert(ledger), asdict(replace(entry, hash=hash_link(entry.hashed, head.hash))))
    return entry.seq


def head_of(connection: Connection, project: str | None = None, votes_only: bool = False) -> ChainHead:
    """Return the ledger's last row; `Head(0, GENESIS)` if there is none.

    Args:
        project: of this project alone.
        votes_only: the last row that changes which votes stand, not one that only changes settings, guidelines or
            items.
    """
    query = select(ledger.c.seq, ledger.c.hash).order_by(ledger.c.seq.desc()).limit(1)
    if project is not None:
        query = query.where(ledger.c.project == project)
    if votes_only:
        query = query.where(ledger.c.kind.in_((*VOTES, "retraction", "erasure")))
    row = connection.execute(query).first()
    return ChainHead(0, GENESIS) if row is None else ChainHead(row.seq, row.hash)


def stands(project: str, row: Any = ledger) -> ColumnElement[bool]:
    """Return the condition of a judgement of this project that no retraction takes back."""
    retraction = ledger.alias("retraction")
    return (row.c.project == project) & row.c.kind.in_(VOTES) & ~exists().where(retraction.c.retracts == row.c.seq)


def row_by_key(connection: Connection, project: str, kind: str, key: str) -> Row[Any] | None:
    """Return the row that an idempotency key already wrote."""
    where = (ledger.c.project == project, ledger.c.kind == kind, ledger.c.key == key)
    return connection.execute(select(ledger).where(*where)).first()


def erasure_of(connection: Connection, project: str, item: str) -> int | None:
    """Return the tombstone of an item, or of its project, if it was erased."""
    where = (ledger.c.project == project, ledger.c.kind == "erasure", ledger.c.item == item)
    return connection.execute(select(ledger.c.seq).where(*where)).scalar() or project_erasure(connection, project)


def project_erasure(connection: Connection, project: str) -> int | None:
    """Return the tombstone of a project, if it was erased."""
    whole = (ledger.c.kind == "erasure", ledger.c.item.is_(None), ledger.c.annotator.is_(None))
    return connection.execute(select(ledger.c.seq).where(ledger.c.project == project, *whole)).scalar()


def known_projects(connection: Connection) -> list[str]:
    """Return the names of all projects, erased ones too."""
    return list(connection.execute(select(ledger.c.project).distinct().order_by(ledger.c.project)).scalars())


def check_project(connection: Connection, project: str) -> None:
    """Raise InputError if the store has no such project. An erased one is known."""
    if connection.execute(select(ledger.c.seq).where(ledger.c.project == project).limit(1)).first() is None:
        known = known_projects(connection)
        remedy = f"It holds {', '.join(known)}." if known else "Fill it first with stage=sample."
        raise InputError("project", project, "the store has no such project", remedy)


def check_item(connection: Connection, project: str, item: str) -> None:
    """Raise InputError if the project has no such item. An erased one is known."""
    where = (ledger.c.project == project, ledger.c.kind == "candidates", ledger.c.item == item)
    if connection.execute(select(ledger.c.seq).where(*where)).first() is None:
        check_project(connection, project)
        raise InputError("item", item, f"project {project} has no such item", "Take an id that the store gave.")


def annotator_of(connection: Connection, project: str, identity: str) -> Row[Any] | None:
    where = (annotators.c.project == project, annotators.c.identity == identity)
    return connection.execute(select(annotators).where(*where)).first()


def ensure_annotator(connection: Connection, project: str, identity: str) -> Row[Any]:
    """Return an annotator, who gets a random pseudonym now if the project has not met them."""
    if (person := annotator_of(connection, project, identity)) is not None:
        return person
    names = {"pseudonym": f"a{secrets.token_hex(6)}", "salt": secrets.token_hex(16)}
    new = insert(annotators).values(project=project, identity=identity, **names).returning(*annotators.c)
    return connection.execute(new).one()


def remark_of(connection: Connection, project: str, seq: int) -> str | None:
    """Return the words that go with a vote, as canonical JSON."""
    mine = (remarks.c.project == project, remarks.c.seq == seq)
    return connection.execute(select(remarks.c.content).where(*mine)).scalar()


# The work that is left


def counts(judgement: Judgement) -> bool:
    """Return whether a judgement is one of those that the project asked for of an item."""
    return judgement.kind == "ranking" and judgement.source == "human" and judgement.purpose == "work"


def count_work(connection: Connection, project: str, item: str, judged: int = 0, leased: int = 0) -> None:
    """Add to the counters of an item; one that was erased has none."""
    added = {"judged": work.c.judged + judged, "leased": work.c.leased + leased}
    connection.execute(update(work).where(work.c.project == project, work.c.item == item).values(added))


def close_leases(connection: Connection, project: str, which: ColumnElement[bool], state: str = "expired") -> None:
    """Take back the project's open leases of which `which` is true."""
    mine = (leases.c.project == project, leases.c.state == "open", which)
    closed = update(leases).where(*mine).values(state=state).returning(leases.c.item, leases.c.purpose)
    for row in connection.execute(closed).all():
        if row.purpose == "work":
            count_work(connection, project, row.item, leased=-1)
