"""What the store asks of its tables, and the checks that say no: functions of an open connection."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, exists, insert, select, update

from align.errors import InputError, require
from align.types import Conversation
from annotate.store.ledger import GENESIS, Entry, Head, canonical, entry_hash, salted_digest
from annotate.store.records import Candidate, Judgement, candidate_row, item_payload, prompt_row, shuffle_of
from annotate.store.tables import annotators, candidates, leases, ledger, prompts, remarks, work


class AlreadyJudged(InputError):
    """The annotator has judged the item, and that judgement stands."""


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
    connection: Connection, before: Row[Any], prompt: Conversation, answers: Sequence[Candidate], known: dict[str, Any]
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
    if item_payload(first, rows) | known != json.loads(before.payload):
        raise InputError("key", before.key, "it was used for other content", "Give every prompt and run its own key.")


def check_expected(item: str, k: int, expected: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """What the ledger keeps of a gold item's known answer: its tiers of candidate ids; of another item nothing."""
    if expected is None:
        return {}
    good = sorted(position for tier in expected for position in tier) == list(range(k)) and all(expected)
    require(good, "expected", [list(t) for t in expected], "it is no order of the answers", "Name 0 … K-1 once each.")
    return {"expected": [sorted(f"{item}-{position}" for position in tier) for tier in expected]}


def check_judgement(connection: Connection, project: str, item: str, judgement: Judgement) -> None:
    """Raises unless the item is there and the judgement speaks of its candidates alone, in a ranking of each once."""
    check_item(connection, project, item)
    where = (candidates.c.project == project, candidates.c.prompt_id == item)
    known = set(connection.execute(select(candidates.c.id).where(*where)).scalars())
    require(bool(known), "item", item, "it was erased", "Rank another.")
    named = {"ratings": set(judgement.ratings), "flagged": set(judgement.flagged) - {item}}
    for name, ids in named.items():
        strange = sorted(ids - known)
        require(not strange, name, strange, f"no candidates of item {item}", f"There are {', '.join(sorted(known))}.")
    if judgement.skipped:
        nothing = not judgement.tiers
        require(nothing, "tiers", judgement.tiers, "a skipped item has no ranking", "Skip it or rank it.")
    else:
        check_tiers(item, known, judgement.tiers)


def check_tiers(item: str, known: set[str], tiers: Sequence[Sequence[str]]) -> None:
    """Raises unless the tiers hold every candidate, each once."""
    ranked = [id for tier in tiers for id in tier]
    unknown, missing = sorted(set(ranked) - known), sorted(known - set(ranked))
    twice = sorted({id for id in ranked if ranked.count(id) > 1})
    require(not unknown, "tiers", unknown, f"no candidates of item {item}", f"Rank {', '.join(sorted(known))}.")
    require(
        not missing, "tiers", missing, f"candidates of item {item} are not ranked", "Rank every one; ties share a tier."
    )
    require(not twice, "tiers", twice, "ranked more than once", "Name every candidate once.")
    require(all(tiers), "tiers", [list(t) for t in tiers], "it has an empty tier", "Leave empty tiers out.")


def check_first(connection: Connection, project: str, item: str, annotator: str, judgement: Judgement) -> None:
    """Raises where the annotator's judgement of the item stands; a repeat needs one, and there is one repeat."""
    mine = select(ledger.c.seq, ledger.c.payload).where(stands(project), ledger.c.item == item)
    rows = connection.execute(mine.where(ledger.c.annotator == annotator).order_by(ledger.c.seq)).all()
    again = [row for row in rows if json.loads(row.payload).get("purpose") == "repeat"]
    first = [row for row in rows if row not in again]
    if judgement.purpose == "repeat":
        require(bool(first), "item", item, "this annotator has not judged it", "Judge it first.")
    earlier = again if judgement.purpose == "repeat" else first
    if earlier:
        problem = f"this annotator's judgement of it stands (seq {earlier[0].seq})"
        raise AlreadyJudged("item", item, problem, "Retract that one first.")


def same_vote(connection: Connection, row: Row[Any], item: str, annotator: str, judgement: Judgement) -> bool:
    """Whether a row of the ledger is this judgement; of a remark that was erased since, any text will do."""
    kept = json.loads(row.payload)
    digest, _ = kept.pop("remark", ""), kept.pop("annotator_digest", None)
    mine = (remarks.c.project == row.project, remarks.c.seq == row.seq)
    salt = connection.execute(select(remarks.c.salt).where(*mine)).scalar()
    remark = judgement.remark()
    if bool(remark) != bool(digest) or (salt is not None and salted_digest(salt, remark) != digest):
        return False
    said = json.loads(canonical(judgement.payload()))
    return (row.item, row.annotator, kept) == (item, annotator, said)


def remark_of(connection: Connection, project: str, seq: int) -> str | None:
    """What goes with a vote, as canonical JSON."""
    mine = (remarks.c.project == project, remarks.c.seq == seq)
    return connection.execute(select(remarks.c.content).where(*mine)).scalar()


# The work that is left


def counts(judgement: Judgement) -> bool:
    """Whether it is one of those that the project asked for of an item."""
    return judgement.kind == "ranking" and judgement.source == "human" and judgement.purpose == "work"


def add_work(connection: Connection, project: str, item: str, wanted: int, priority: float, gold: bool) -> None:
    row = {"project": project, "item": item, "wanted": wanted, "judged": 0, "leased": 0, "gold": gold}
    connection.execute(insert(work), row | {"shuffle": shuffle_of(item), "priority": priority})


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
