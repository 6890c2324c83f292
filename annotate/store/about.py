"""What the store holds of one thing that is to be forgotten everywhere, and its erasure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement, Connection, select

from align.annotate.store.database import Store
from align.annotate.store.queries import VOTES, check_item, check_project, erasure_of, known_projects, project_erasure
from align.annotate.store.records import Item
from align.annotate.store.tables import annotators, ledger, remarks
from align.core.errors import InputError

ITEM, ANNOTATOR, PROJECT = "item", "annotator", "project"


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
        """Whether a run read such a judgement that read the project when `seq` was the newest row of its ledger."""
        return any(row <= seq and (taken is None or taken > seq) for row, taken in self.votes.items())


def projects_in(store: Store) -> list[str]:
    """The names of all projects, erased ones too."""
    with store.reading() as connection:
        return known_projects(connection)


def about(store: Store, project: str, what: str, given: str) -> About:
    """What there is of an item, an annotator or a project.

    Args:
        given: the item's id; an annotator's name or pseudonym; nothing of a project.

    Raises:
        InputError: the store knows no such thing.
    """
    with store.reading() as connection:
        check_project(connection, project)
        if what == ITEM:
            check_item(connection, project, given)
            return about_item(store, connection, project, given)
        return (
            about_annotator(store, connection, project, given)
            if what == ANNOTATOR
            else about_project(store, connection, project)
        )


def about_item(store: Store, connection: Connection, project: str, id: str) -> About:
    own, others = set[str](), set[str]()
    answers = 0
    for item in store.items(project):
        (own if item.id == id else others).update(texts_of(item))
        answers += len(item.candidates) if item.id == id else 0
    votes = judgements(connection, project, ledger.c.item == id)
    if (erased := erasure_of(connection, project, id)) is not None:  # what was read behind it had none of them
        votes = {row: erased if taken is None else min(taken, erased) for row, taken in votes.items()}
    written = remarks_in(connection, project, remarks.c.item == id)
    standing = sum(taken is None for taken in votes.values()) if answers else 0
    rows = {"item": int(bool(answers)), "answer": answers, "judgement": standing, "remark": len(written)}
    own.update(text for one in written for text in one)
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
    written = remarks_in(connection, project, remarks.c.annotator == pseudonym)
    texts = frozenset(text for one in written for text in one)
    standing = sum(taken is None for taken in votes.values())
    rows = {"name": int(name is not None), "judgement": standing, "remark": len(written)}
    return About(project, ANNOTATOR, pseudonym, votes, texts, names=frozenset([name] if name else []), rows=rows)


def about_project(store: Store, connection: Connection, project: str) -> About:
    items = list(store.items(project))
    erased = project_erasure(connection, project)
    votes = judgements(connection, project, ledger.c.project == project)
    if erased is not None:
        votes = {row: erased if taken is None else min(taken, erased) for row, taken in votes.items()}
    named = select(annotators.c.identity).where(annotators.c.project == project)
    names = frozenset(connection.execute(named).scalars())
    written = remarks_in(connection, project, remarks.c.project == project)
    texts = frozenset(text for one in (*map(texts_of, items), *written) for text in one)
    rows = {"project": int(erased is None), "item": len(items), "name": len(names), "remark": len(written)}
    return About(project, PROJECT, project, votes, texts, names=names, rows=rows)


def judgements(connection: Connection, project: str, which: ColumnElement[bool]) -> dict[int, int | None]:
    """Rows of the ledger → those that took them back."""
    taken = ledger.alias("taken")
    query = select(ledger.c.seq, taken.c.seq).outerjoin(taken, taken.c.retracts == ledger.c.seq)
    mine = query.where(ledger.c.project == project, ledger.c.kind.in_(VOTES), which)
    return {row[0]: row[1] for row in connection.execute(mine)}


def texts_of(item: Item) -> Iterator[str]:
    yield from (turn.content for turn in item.prompt.messages if turn.content)
    yield from (candidate.text for candidate in item.candidates if candidate.text)


def remarks_in(connection: Connection, project: str, which: ColumnElement[bool]) -> list[list[str]]:
    """The texts of each remark."""
    mine = select(remarks.c.content).where(remarks.c.project == project, which)
    found = (json.loads(content) for content in connection.execute(mine).scalars())
    return [[text for text in one.values() if isinstance(text, str) and text] for one in found]


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
