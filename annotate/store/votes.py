"""Judgements: recorded once, retracted once, and those that stand. Functions of an open connection."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection, exists, insert, select

from align.annotate.store.checks import check_first, check_judgement
from align.annotate.store.queries import (
    VOTES,
    annotator_of,
    append,
    check_project,
    count_work,
    counts,
    head_of,
    is_gold,
    new_annotator,
    row_by_key,
    same_vote,
    stands,
)
from align.annotate.store.records import Judgement, Vote, remark_row, vote_of
from align.annotate.store.tables import ledger, prompts, remarks
from align.core.chain import salted_digest
from align.core.errors import InputError


def record(connection: Connection, project: str, item: str, judgement: Judgement, annotator: str, key: str) -> int:
    """The row of a judgement in the ledger. Raises as `Store.record` does."""
    person = annotator_of(connection, project, annotator)
    if is_gold(connection, project, item):
        judgement = replace(judgement, purpose="gold")
    before = row_by_key(connection, project, judgement.kind, key)
    if before is not None:
        if person is None or not same_vote(connection, before, item, person.pseudonym, judgement):
            raise InputError("key", key, "it was used for another judgement", "Send a fresh key.")
        return before.seq
    check_judgement(connection, project, item, judgement)
    if person is None:
        person = new_annotator(connection, project, annotator)
    check_first(connection, project, item, person.pseudonym, judgement)
    payload = judgement.payload() | {"annotator_digest": salted_digest(person.salt, annotator)}
    seq = head_of(connection).seq + 1
    if remark := judgement.remark():
        row = remark_row(project, seq, item, person.pseudonym, remark)
        connection.execute(insert(remarks), row)
        payload["remark"] = salted_digest(row["salt"], remark)
    append(connection, project, judgement.kind, payload, item=item, annotator=person.pseudonym, key=key)
    if counts(judgement):
        count_work(connection, project, item, judged=1)
    return seq


def retract(connection: Connection, project: str, seq: int) -> int:
    """The row of a judgement's retraction. Raises as `Store.retract` does."""
    of_project = ledger.c.project == project
    row = connection.execute(select(ledger).where(of_project, ledger.c.seq == seq)).first()
    if row is None or row.kind not in VOTES:
        check_project(connection, project)
        raise InputError("seq", seq, f"it is no judgement of project {project}", "Give a vote's seq.")
    before = connection.execute(select(ledger.c.seq).where(ledger.c.retracts == seq)).scalar()
    if before is not None:
        return before
    if counts(vote_of(row, None)):
        count_work(connection, project, row.item, judged=-1)
    return append(connection, project, "retraction", {}, item=row.item, annotator=row.annotator, retracts=seq)


def standing(connection: Connection, project: str, kind: str) -> list[Vote]:
    """The judgements of a kind that are not retracted, their item not erased, in ledger order."""
    check_project(connection, project)
    present = exists().where(prompts.c.project == ledger.c.project, prompts.c.id == ledger.c.item)
    with_it = (remarks.c.project == ledger.c.project) & (remarks.c.seq == ledger.c.seq)
    query = select(ledger, remarks.c.content).outerjoin(remarks, with_it)
    mine = query.where(stands(project), ledger.c.kind == kind, present).order_by(ledger.c.seq)
    return [vote_of(row, row.content) for row in connection.execute(mine)]
