"""Contents of the store that concern one item, annotator or project, and their erasure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, delete, exists, select, true

from align.annotate.store.ledger import (
    VOTE_KINDS,
    find_item_tombstone,
    find_project_tombstone,
    require_known_item,
    require_known_project,
)
from align.annotate.store.records import AnnotationItem
from align.annotate.store.tables import annotators, invitations, ledger, members, remarks, users
from align.core.errors import InputError

if TYPE_CHECKING:
    from align.annotate.store.database import Store

RetractionsBySeq = dict[int, int | None]
"""Number of a judgement's row in the ledger → number of its retraction's row, or None if it was not retracted."""

ITEM = "item"
ANNOTATOR = "annotator"
PROJECT = "project"


@dataclass(frozen=True, slots=True)
class ErasureTarget:
    """The contents of the store that concern one item, annotator or project, and would be erased with it.

    Attributes:
        kind: `item`, `annotator` or `project`.
        id: the item's id, the annotator's pseudonym or the project's name.
        votes: the judgements of the item or by the annotator: seq of the row → seq of its retraction, or None if it
            stands.
        texts: texts by people and models.
        shared: texts that other items of the project contain too; of an item only.
        names: the annotators' identities.
        rows: kind of row to erase, in the singular → number of rows.
    """

    project: str
    kind: str
    id: str
    votes: Mapping[int, int | None] = field(default_factory=dict)
    texts: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    rows: Mapping[str, int] = field(default_factory=dict)

    def was_read_at(self, seq: int) -> bool:
        """Return whether any of the judgements was recorded and not yet retracted at ledger row `seq`.

        Then a run that read the project at this row read it.
        """
        return any(row <= seq and (retraction is None or retraction > seq) for row, retraction in self.votes.items())


def find_erasure_target(store: Store, project: str, kind: str, identifier: str) -> ErasureTarget:
    """Return the contents of the store that concern an item, an annotator or a project. Nothing is erased yet.

    Args:
        kind: `ITEM`, `ANNOTATOR` or `PROJECT`.
        identifier: the item's id, or the annotator's name or pseudonym; ignored for a project.

    Raises:
        InputError: the project or the subject is unknown.
    """
    with store.reading() as connection:
        require_known_project(connection, project)
        if kind == ITEM:
            return find_item_target(store, connection, project, identifier)
        if kind == ANNOTATOR:
            return find_annotator_target(store, connection, project, identifier)
        return find_project_target(store, connection, project)


def find_item_target(store: Store, connection: Connection, project: str, id: str) -> ErasureTarget:
    require_known_item(connection, project, id)
    item_texts = set[str]()
    other_texts = set[str]()
    answers = 0
    for item in store.items(project):
        if item.id == id:
            item_texts.update(iter_texts(item))
            answers = len(item.candidates)
        else:
            other_texts.update(iter_texts(item))
    votes = read_judgements(connection, project, ledger.c.item == id, find_item_tombstone(connection, project, id))
    item_remarks = read_remarks(connection, project, remarks.c.item == id)
    item_texts.update(item_remarks.texts)
    standing_votes = sum(retraction is None for retraction in votes.values()) if answers else 0
    rows = {
        "item": int(bool(answers)),
        "answer": answers,
        "judgement": standing_votes,
        "remark": item_remarks.row_count,
    }
    return ErasureTarget(
        project, ITEM, id, votes, frozenset(item_texts - other_texts), frozenset(item_texts & other_texts), rows=rows
    )


def find_annotator_target(store: Store, connection: Connection, project: str, identifier: str) -> ErasureTarget:
    pseudonym = store.pseudonym(project, identifier) or identifier
    identities = select(annotators.c.identity).where(
        annotators.c.project == project, annotators.c.pseudonym == pseudonym
    )
    name = connection.execute(identities).scalar()
    if name is None and store.find_first_row(project, annotator=pseudonym) is None:
        problem = f"project {project} has no such annotator"
        remedy = "Check the spelling, or name another project=…; after an erasure, only the pseudonym is known."
        raise InputError("annotator", identifier, problem, remedy)
    votes = read_judgements(connection, project, ledger.c.annotator == pseudonym)
    own_remarks = read_remarks(connection, project, remarks.c.annotator == pseudonym)
    standing_votes = sum(retraction is None for retraction in votes.values())
    rows = {"name": int(name is not None), "judgement": standing_votes, "remark": own_remarks.row_count}
    return ErasureTarget(
        project, ANNOTATOR, pseudonym, votes, own_remarks.texts, names=frozenset([name] if name else []), rows=rows
    )


def find_project_target(store: Store, connection: Connection, project: str) -> ErasureTarget:
    items = list(store.items(project))
    erased = find_project_tombstone(connection, project)
    votes = read_judgements(connection, project, true(), erased)
    identities = select(annotators.c.identity).where(annotators.c.project == project)
    names = frozenset(connection.execute(identities).scalars())
    project_remarks = read_remarks(connection, project, true())
    texts = project_remarks.texts.union(*map(iter_texts, items))
    rows = {"project": int(erased is None), "item": len(items), "name": len(names), "remark": project_remarks.row_count}
    return ErasureTarget(project, PROJECT, project, votes, texts, names=names, rows=rows)


def read_judgements(
    connection: Connection, project: str, condition: ColumnElement[bool], tombstone: int | None = None
) -> RetractionsBySeq:
    """Return a mapping from the ledger row of each judgement that fulfils an SQL condition to that of its retraction.

    The value is `None` for a judgement that was not retracted.

    Args:
        tombstone: seq of the erasure of the item or project; a judgement counts as retracted from there on.
    """
    retractions = ledger.alias("retraction")
    query = select(ledger.c.seq, retractions.c.seq).outerjoin(retractions, retractions.c.retracts == ledger.c.seq)
    query = query.where(ledger.c.project == project, ledger.c.kind.in_(VOTE_KINDS), condition)
    votes = {row[0]: row[1] for row in connection.execute(query)}
    if tombstone is None:
        return votes
    return {seq: tombstone if retraction is None else min(retraction, tombstone) for seq, retraction in votes.items()}


def iter_texts(item: AnnotationItem) -> Iterator[str]:
    yield from (turn.content for turn in item.prompt.messages if turn.content)
    yield from (candidate.text for candidate in item.candidates if candidate.text)


class Remarks(NamedTuple):
    """The texts that annotators wrote on their votes, and the number of their rows.

    Attributes:
        row_count: number of rows of `remarks`.
        texts: the rationales and the annotators' own answers.
    """

    row_count: int
    texts: frozenset[str]


def read_remarks(connection: Connection, project: str, condition: ColumnElement[bool]) -> Remarks:
    """Return the annotators' texts on votes, from the rows of `remarks` that fulfil an SQL condition."""
    query = select(remarks.c.content).where(remarks.c.project == project, condition)
    contents = [json.loads(content) for content in connection.execute(query).scalars()]
    texts = (text for content in contents for text in content.values() if isinstance(text, str) and text)
    return Remarks(len(contents), frozenset(texts))


def erase_target(store: Store, target: ErasureTarget) -> None:
    """Erase an item, an annotator or a project from the store, in one transaction.

    Contents that were erased before are skipped. An annotator's standing judgements are retracted as well, so that
    later runs do not learn from them.
    """
    with store.transaction():
        if target.kind == ITEM:
            store.erase_content(target.project, target.id)
        elif target.kind == PROJECT:
            store.erase_project(target.project)
        else:
            for seq, retraction in target.votes.items():
                if retraction is None:
                    store.retract(target.project, seq)
            if target.names:
                store.erase_annotator(target.project, target.id)


def find_user(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(select(users).where(users.c.name == name)).first()


def remove_member(connection: Connection, project: str, name: str) -> None:
    """Remove a person from a project, with the invitations that they made or that are for them.

    If they are in no project any more, their account and its sessions are deleted.
    """
    in_project = invitations.c.project == project
    user = find_user(connection, name)
    if user is not None:
        connection.execute(delete(members).where(members.c.project == project, members.c.user == user.id))
        connection.execute(delete(invitations).where(in_project, invitations.c.made_by == user.id))
        other_membership = exists().where(members.c.user == user.id)
        if connection.execute(delete(users).where(users.c.id == user.id, ~other_membership)).rowcount:
            in_project = true()
    connection.execute(delete(invitations).where(in_project, invitations.c.name == name))
