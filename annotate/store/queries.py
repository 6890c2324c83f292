"""What the store asks of its tables, and the checks that say no: functions of an open connection."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, exists, insert, select

from align.errors import InputError, require
from align.types import Conversation
from annotate.store.ledger import GENESIS, Entry, Head, canonical, entry_hash
from annotate.store.records import Candidate, candidate_row, item_payload, prompt_row
from annotate.store.schema import annotators, candidates, ledger, prompts


def stands(project: str, row: Any = ledger) -> ColumnElement[bool]:
    """A ranking of this project that no retraction takes back."""
    retraction = ledger.alias("retraction")
    return (row.c.project == project) & (row.c.kind == "ranking") & ~exists().where(retraction.c.retracts == row.c.seq)


def head_of(connection: Connection, project: str | None = None) -> Head:
    query = select(ledger.c.seq, ledger.c.hash).order_by(ledger.c.seq.desc()).limit(1)
    row = connection.execute(query if project is None else query.where(ledger.c.project == project)).first()
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


def act(connection: Connection, project: str, kind: str, key: str) -> Row[Any] | None:
    """The row that an idempotency key already wrote."""
    where = (ledger.c.project == project, ledger.c.kind == kind, ledger.c.key == key)
    return connection.execute(select(ledger).where(*where)).first()


def annotator_of(connection: Connection, project: str, identity: str) -> Row[Any] | None:
    where = (annotators.c.project == project, annotators.c.identity == identity)
    return connection.execute(select(annotators).where(*where)).first()


def meet(connection: Connection, project: str, identity: str) -> Row[Any]:
    """A new annotator, under a random pseudonym."""
    names = {"pseudonym": f"a{secrets.token_hex(6)}", "salt": secrets.token_hex(16)}
    connection.execute(insert(annotators), {"project": project, "identity": identity, **names})
    return connection.execute(select(annotators).where(annotators.c.pseudonym == names["pseudonym"])).one()


def erasure_of(connection: Connection, project: str, item: str) -> int | None:
    """The tombstone of an item, if it was erased."""
    where = (ledger.c.project == project, ledger.c.kind == "erasure", ledger.c.item == item)
    return connection.execute(select(ledger.c.seq).where(*where)).scalar()


def check_project(connection: Connection, project: str) -> None:
    if connection.execute(select(ledger.c.seq).where(ledger.c.project == project).limit(1)).first() is None:
        known = connection.execute(select(ledger.c.project).distinct().order_by(ledger.c.project)).scalars().all()
        remedy = f"It holds {', '.join(known)}." if known else "Fill it first with stage=sample."
        raise InputError("project", project, "the store has no such project", remedy)


def check_item(connection: Connection, project: str, item: str) -> None:
    where = (ledger.c.project == project, ledger.c.kind == "candidates", ledger.c.item == item)
    if connection.execute(select(ledger.c.seq).where(*where)).first() is None:
        check_project(connection, project)
        raise InputError("item", item, f"project {project} has no such item", "Take an id that the store gave.")


def check_same_item(
    connection: Connection, before: Row[Any], prompt: Conversation, answers: Sequence[Candidate]
) -> None:
    """Raises unless the row's item holds just this content; an erased one is left in peace."""
    here = (candidates.c.project == before.project, candidates.c.prompt_id == before.item)
    kept = connection.execute(select(candidates.c.position, candidates.c.salt).where(*here))
    salts = {row.position: row.salt for row in kept}
    where = (prompts.c.project == before.project, prompts.c.id == before.item)
    salt = connection.execute(select(prompts.c.salt).where(*where)).scalar()
    if salt is None and erasure_of(connection, before.project, before.item) is not None:
        return
    first = prompt_row(before.project, before.item, prompt, salt or "")
    rows = [candidate_row(before.project, before.item, k, a, salts.get(k, "")) for k, a in enumerate(answers)]
    if item_payload(first, rows) != json.loads(before.payload):
        raise InputError("key", before.key, "it was used for other content", "Give every prompt and run its own key.")


def check_tiers(connection: Connection, project: str, item: str, tiers: Sequence[Sequence[str]]) -> None:
    """Raises unless the tiers hold every candidate of the item, each once."""
    check_item(connection, project, item)
    where = (candidates.c.project == project, candidates.c.prompt_id == item)
    known = set(connection.execute(select(candidates.c.id).where(*where)).scalars())
    require(bool(known), "item", item, "it was erased", "Rank another.")
    ranked = [id for tier in tiers for id in tier]
    unknown, missing = sorted(set(ranked) - known), sorted(known - set(ranked))
    twice = sorted({id for id in ranked if ranked.count(id) > 1})
    require(not unknown, "tiers", unknown, f"no candidates of item {item}", f"Rank {', '.join(sorted(known))}.")
    require(
        not missing, "tiers", missing, f"candidates of item {item} are not ranked", "Rank every one; ties share a tier."
    )
    require(not twice, "tiers", twice, "ranked more than once", "Name every candidate once.")
    require(all(tiers), "tiers", [list(t) for t in tiers], "it has an empty tier", "Leave empty tiers out.")
