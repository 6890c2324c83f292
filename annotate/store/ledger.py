"""The ledger's rows, links of a chain of hashes (`align.core.chain`), and queries on the ledger and its neighbouring
tables. All functions take an open connection.

A ledger whose last rows were cut off can only be recognised by a head noted elsewhere, which is why a reward run
records it.

Rows never hold a text or a name, only `sha256(salt, content)`. Content and salt lie in erasable tables: once both are
gone the digest can neither be reversed nor confirmed by guessing, and the chain still verifies.
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

VOTE_KINDS = ("ranking", "skip")
"""Kinds of ledger rows that hold an annotator's judgement of an item."""
QUARANTINE_KINDS = ("quarantine", "release")
"""Kinds of ledger rows that decide whether an annotator's votes count: the last one does."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A row of the ledger, the append-only log of all changes in an annotation store.

    Attributes:
        seq: 1, 2, 3, … over the whole store, without gaps.
        project: the name of the project.
        kind: `candidates`, `ranking`, `skip`, `retraction`, `quarantine`, `release`, `settings`, `guidelines` or
            `erasure`.
        item: the item concerned; None if the row erases an annotator or concerns the project.
        annotator: the pseudonym concerned, or None.
        key: the idempotency key, unique within project and kind; None if the act is idempotent by itself.
        retracts: the seq of the judgement that a retraction takes back; None for other kinds.
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
        """The values of all fields except the two hashes, in their order, from which the row's hash is computed."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in ("prev_hash", "hash"))


def append_ledger_row(connection: Connection, project: str, kind: str, payload: dict[str, Any], **columns: Any) -> int:
    """Append a row to the ledger, chained to the last one by its hash, and return its number (seq).

    Args:
        columns: any of item, annotator, key, retracts.
    """
    head = read_ledger_head(connection)
    columns = {"item": None, "annotator": None, "key": None, "retracts": None, **columns}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    text = to_canonical_json(payload)
    entry = LedgerEntry(head.seq + 1, project, kind, created_at=now, payload=text, prev_hash=head.hash, **columns)
    connection.execute(insert(ledger), asdict(replace(entry, hash=hash_link(entry.hashed, head.hash))))
    return entry.seq


def read_ledger_head(connection: Connection, project: str | None = None, votes_only: bool = False) -> ChainHead:
    """Return the number and hash of the last row of the whole ledger or of one project.

    Returns `ChainHead(0, GENESIS)` if there is no row.

    Args:
        project: consider the rows of this project alone.
        votes_only: consider only rows that change which votes stand, not changes of settings, guidelines or items.
    """
    query = select(ledger.c.seq, ledger.c.hash).order_by(ledger.c.seq.desc()).limit(1)
    if project is not None:
        query = query.where(ledger.c.project == project)
    if votes_only:
        query = query.where(ledger.c.kind.in_((*VOTE_KINDS, *QUARANTINE_KINDS, "retraction", "erasure")))
    row = connection.execute(query).first()
    return ChainHead(0, GENESIS) if row is None else ChainHead(row.seq, row.hash)


def build_standing_vote_condition(project: str) -> ColumnElement[bool]:
    """Build the SQL condition that selects the ledger rows of a project's judgements that were not retracted."""
    retraction = ledger.alias("retraction")
    is_retracted = exists().where(retraction.c.retracts == ledger.c.seq)
    return (ledger.c.project == project) & ledger.c.kind.in_(VOTE_KINDS) & ~is_retracted


def find_row_by_key(connection: Connection, project: str, kind: str, key: str) -> Row[Any] | None:
    """Return the ledger row of a kind that was written with an idempotency key in a project, or None."""
    conditions = (ledger.c.project == project, ledger.c.kind == kind, ledger.c.key == key)
    return connection.execute(select(ledger).where(*conditions)).first()


def find_item_tombstone(connection: Connection, project: str, item: str) -> int | None:
    """Return the number of the ledger row that records the erasure of an item or of its project, or None."""
    conditions = (ledger.c.project == project, ledger.c.kind == "erasure", ledger.c.item == item)
    return connection.execute(select(ledger.c.seq).where(*conditions)).scalar() or find_project_tombstone(
        connection, project
    )


def find_project_tombstone(connection: Connection, project: str) -> int | None:
    """Return the number of the ledger row that records the erasure of a project, or None if it was not erased."""
    conditions = (ledger.c.kind == "erasure", ledger.c.item.is_(None), ledger.c.annotator.is_(None))
    return connection.execute(select(ledger.c.seq).where(ledger.c.project == project, *conditions)).scalar()


def list_project_names(connection: Connection) -> list[str]:
    """Return the names of all projects in the ledger, sorted, including erased ones."""
    return list(connection.execute(select(ledger.c.project).distinct().order_by(ledger.c.project)).scalars())


def require_known_project(connection: Connection, project: str) -> None:
    """Raise InputError if the store has no such project. An erased project passes."""
    if connection.execute(select(ledger.c.seq).where(ledger.c.project == project).limit(1)).first() is None:
        names = list_project_names(connection)
        remedy = f"It holds {', '.join(names)}." if names else "Fill it first with stage=sample."
        raise InputError("project", project, "the store has no such project", remedy)


def require_known_item(connection: Connection, project: str, item: str) -> None:
    """Raise InputError if the project has no such item. An erased item passes."""
    conditions = (ledger.c.project == project, ledger.c.kind == "candidates", ledger.c.item == item)
    if connection.execute(select(ledger.c.seq).where(*conditions)).first() is None:
        require_known_project(connection, project)
        raise InputError("item", item, f"project {project} has no such item", "Give the id of an item of the project.")


def find_annotator(connection: Connection, project: str, identity: str) -> Row[Any] | None:
    conditions = (annotators.c.project == project, annotators.c.identity == identity)
    return connection.execute(select(annotators).where(*conditions)).first()


def ensure_annotator(connection: Connection, project: str, identity: str) -> Row[Any]:
    """Return an annotator's row of a project, which is inserted with a random pseudonym if none exists."""
    if (annotator := find_annotator(connection, project, identity)) is not None:
        return annotator
    columns = {"pseudonym": f"a{secrets.token_hex(6)}", "salt": secrets.token_hex(16)}
    statement = insert(annotators).values(project=project, identity=identity, **columns).returning(*annotators.c)
    return connection.execute(statement).one()


def read_remark(connection: Connection, project: str, seq: int) -> str | None:
    """Return the annotator's texts on the vote of ledger row `seq`, as canonical JSON, or None if it has none."""
    conditions = (remarks.c.project == project, remarks.c.seq == seq)
    return connection.execute(select(remarks.c.content).where(*conditions)).scalar()


def read_quarantined(connection: Connection, project: str, through: int | None = None) -> frozenset[str]:
    """Return the pseudonyms of the annotators of a project who are in quarantine.

    Args:
        through: number of the last row of the ledger that counts; None for all.
    """
    query = select(ledger.c.annotator, ledger.c.kind).where(
        ledger.c.project == project, ledger.c.kind.in_(QUARANTINE_KINDS)
    )
    if through is not None:
        query = query.where(ledger.c.seq <= through)
    kind_of_annotator = {row.annotator: row.kind for row in connection.execute(query.order_by(ledger.c.seq))}
    return frozenset(annotator for annotator, kind in kind_of_annotator.items() if kind == "quarantine")


# Counters of the remaining work


def is_counted(judgement: Judgement) -> bool:
    """Return whether a judgement is one of the votes that its item needs: a person's ranking with purpose `work`."""
    return judgement.kind == "ranking" and judgement.source == "human" and judgement.purpose == "work"


def add_to_counters(connection: Connection, project: str, item: str, judged: int = 0, leased: int = 0) -> None:
    """Add to the numbers of votes (`judged`) and open leases (`leased`) in an item's row of the table `work`.

    An erased item has no row.
    """
    counters = {"judged": work.c.judged + judged, "leased": work.c.leased + leased}
    connection.execute(update(work).where(work.c.project == project, work.c.item == item).values(counters))


def close_leases(connection: Connection, project: str, condition: ColumnElement[bool], state: str = "expired") -> None:
    """Close a project's open leases that fulfil an SQL condition: set their state, and lower the lease counters."""
    conditions = (leases.c.project == project, leases.c.state == "open", condition)
    statement = update(leases).where(*conditions).values(state=state).returning(leases.c.item, leases.c.purpose)
    for row in connection.execute(statement).all():
        if row.purpose == "work":
            add_to_counters(connection, project, row.item, leased=-1)
