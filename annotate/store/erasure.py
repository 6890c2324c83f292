"""What the store holds of an item, an annotator or a project that is to be forgotten, and its erasure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, Connection, Row, delete, exists, select, true

from align.annotate.store.ledger import VOTES, check_item, check_project, erasure_of, project_erasure
from align.annotate.store.records import Item
from align.annotate.store.tables import annotators, invitations, ledger, members, remarks, users
from align.core.errors import InputError

if TYPE_CHECKING:
    from align.annotate.store.database import Store

ITEM = "item"
ANNOTATOR = "annotator"
PROJECT = "project"


@dataclass(frozen=True, slots=True)
class About:
    """One item, annotator or project.

    Attributes:
        what: `item`, `annotator` or `project`.
        id: of the item; the annotator's pseudonym; the project's name.
        votes: the judgements on it or by them: row of the ledger → row of its retraction, None of one that stands.
        texts: what people and models wrote of it.
        shared: those that other items of the project have too.
        names: of the annotator, as people know them.
        rows: what there is to erase, in the singular → how many.
    """

    project: str
    what: str
    id: str
    votes: Mapping[int, int | None] = field(default_factory=dict)
    texts: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    rows: Mapping[str, int] = field(default_factory=dict)

    def read_by(self, seq: int) -> bool:
        """Return whether a run read such a judgement that read the project when `seq` was the newest row of its
        ledger."""
        return any(row <= seq and (taken is None or taken > seq) for row, taken in self.votes.items())


def about(store: Store, project: str, what: str, given: str) -> About:
    """Return what there is of an item, an annotator or a project.

    Args:
        given: the item's id; an annotator's name or pseudonym; nothing of a project.

    Raises:
        InputError: the store knows no such thing.
    """
    with store.reading() as connection:
        check_project(connection, project)
        if what == ITEM:
            return about_item(store, connection, project, given)
        if what == ANNOTATOR:
            return about_annotator(store, connection, project, given)
        return about_project(store, connection, project)


def about_item(store: Store, connection: Connection, project: str, id: str) -> About:
    check_item(connection, project, id)
    own = set[str]()
    others = set[str]()
    answers = 0
    for item in store.items(project):
        if item.id == id:
            own.update(texts_of(item))
            answers = len(item.candidates)
        else:
            others.update(texts_of(item))
    votes = judgements(connection, project, ledger.c.item == id, erasure_of(connection, project, id))
    remark_count, words = remarks_in(connection, project, remarks.c.item == id)
    own.update(words)
    standing = sum(taken is None for taken in votes.values()) if answers else 0
    rows = {"item": int(bool(answers)), "answer": answers, "judgement": standing, "remark": remark_count}
    return About(project, ITEM, id, votes, frozenset(own - others), frozenset(own & others), rows=rows)


def about_annotator(store: Store, connection: Connection, project: str, given: str) -> About:
    pseudonym = store.pseudonym(project, given) or given
    known = select(annotators.c.identity).where(annotators.c.project == project, annotators.c.pseudonym == pseudonym)
    name = connection.execute(known).scalar()
    if name is None and store.first_row(project, annotator=pseudonym) is None:
        problem = f"nothing is known of them in project {project}"
        remedy = "Check the spelling, or name another project=…; an erased one is known by the pseudonym alone."
        raise InputError("annotator", given, problem, remedy)
    votes = judgements(connection, project, ledger.c.annotator == pseudonym)
    remark_count, words = remarks_in(connection, project, remarks.c.annotator == pseudonym)
    standing = sum(taken is None for taken in votes.values())
    rows = {"name": int(name is not None), "judgement": standing, "remark": remark_count}
    return About(project, ANNOTATOR, pseudonym, votes, words, names=frozenset([name] if name else []), rows=rows)


def about_project(store: Store, connection: Connection, project: str) -> About:
    items = list(store.items(project))
    erased = project_erasure(connection, project)
    votes = judgements(connection, project, true(), erased)
    identities = select(annotators.c.identity).where(annotators.c.project == project)
    names = frozenset(connection.execute(identities).scalars())
    remark_count, words = remarks_in(connection, project, true())
    texts = words.union(*map(texts_of, items))
    rows = {"project": int(erased is None), "item": len(items), "name": len(names), "remark": remark_count}
    return About(project, PROJECT, project, votes, texts, names=names, rows=rows)


def judgements(
    connection: Connection, project: str, which: ColumnElement[bool], erased: int | None = None
) -> dict[int, int | None]:
    """Return rows of the ledger → those that took them back.

    Args:
        erased: the tombstone of what they were on: what was read behind it had none of them.
    """
    taken = ledger.alias("taken")
    query = select(ledger.c.seq, taken.c.seq).outerjoin(taken, taken.c.retracts == ledger.c.seq)
    query = query.where(ledger.c.project == project, ledger.c.kind.in_(VOTES), which)
    rows = {row[0]: row[1] for row in connection.execute(query)}
    if erased is None:
        return rows
    return {row: erased if taken is None else min(taken, erased) for row, taken in rows.items()}


def texts_of(item: Item) -> Iterator[str]:
    yield from (turn.content for turn in item.prompt.messages if turn.content)
    yield from (candidate.text for candidate in item.candidates if candidate.text)


def remarks_in(connection: Connection, project: str, which: ColumnElement[bool]) -> tuple[int, frozenset[str]]:
    """Return the number of remarks, and the texts in them."""
    mine = select(remarks.c.content).where(remarks.c.project == project, which)
    contents = [json.loads(content) for content in connection.execute(mine).scalars()]
    texts = (text for content in contents for text in content.values() if isinstance(text, str) and text)
    return len(contents), frozenset(texts)


def erase(store: Store, found: About) -> None:
    """Erase it, all or nothing. Of an annotator the judgements that stand are taken back too: a run that is made again
    shall not learn from them. What was erased before stays so."""
    with store.transaction():
        if found.what == ITEM:
            store.erase_content(found.project, found.id)
        elif found.what == PROJECT:
            store.erase_project(found.project)
        else:
            for row, taken in found.votes.items():
                if taken is None:
                    store.retract(found.project, row)
            if found.names:
                store.erase_annotator(found.project, found.id)


def user_named(connection: Connection, name: str) -> Row | None:
    return connection.execute(select(users).where(users.c.name == name)).first()


def remove_member(connection: Connection, project: str, name: str) -> None:
    """Take somebody out of a project, with the links that they made or that are for them; their account goes, with its
    sessions, if it is in no project any more."""
    of_project = invitations.c.project == project
    user = user_named(connection, name)
    if user is not None:
        connection.execute(delete(members).where(members.c.project == project, members.c.user == user.id))
        connection.execute(delete(invitations).where(of_project, invitations.c.made_by == user.id))
        elsewhere = exists().where(members.c.user == user.id)
        if connection.execute(delete(users).where(users.c.id == user.id, ~elsewhere)).rowcount:
            of_project = true()
    connection.execute(delete(invitations).where(of_project, invitations.c.name == name))
