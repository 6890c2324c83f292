"""Erasure: contents and names go, and a tombstone in the ledger says so. Functions of an open connection."""

from __future__ import annotations

from sqlalchemy import Connection, delete, select

from align.annotate.store.queries import append, check_project, close_leases
from align.annotate.store.tables import (
    annotators,
    candidates,
    drafts,
    guidelines,
    invitations,
    keys,
    leases,
    members,
    projects,
    prompts,
    remarks,
    users,
    work,
)
from align.annotate.store.users import leave
from align.errors import InputError


def erase_item(connection: Connection, project: str, item: str) -> int:
    """The tombstone of an item that is there."""
    its = (candidates.c.project == project, candidates.c.prompt_id == item)
    connection.execute(delete(candidates).where(*its))
    connection.execute(delete(prompts).where(prompts.c.project == project, prompts.c.id == item))
    for table in (remarks, drafts, work, leases):
        connection.execute(delete(table).where(table.c.project == project, table.c.item == item))
    return append(connection, project, "erasure", {"what": "item"}, item=item)


def erase_annotator(connection: Connection, project: str, pseudonym: str) -> int:
    """The tombstone of an annotator. Raises as `Store.erase_annotator` does."""
    mine = (annotators.c.project == project, annotators.c.pseudonym == pseudonym)
    name = connection.execute(delete(annotators).where(*mine).returning(annotators.c.identity)).scalar()
    if name is None:
        check_project(connection, project)
        remedy = "Ask `known` for it; an erased one is not known any more."
        raise InputError("annotator", pseudonym, f"project {project} knows no such annotator", remedy)
    leave(connection, project, name)
    for table in (remarks, drafts):
        theirs = (table.c.project == project, table.c.annotator == pseudonym)
        connection.execute(delete(table).where(*theirs))
    close_leases(connection, project, leases.c.annotator == pseudonym)
    return append(connection, project, "erasure", {"what": "annotator"}, annotator=pseudonym)


def erase_project(connection: Connection, project: str) -> int:
    """The tombstone of a project: its items, people, guidelines, settings and key go, and the accounts that no other
    project has."""
    known = select(users.c.name).join(members, members.c.user == users.c.id).where(members.c.project == project)
    people = select(annotators.c.identity).where(annotators.c.project == project)
    for name in {*connection.execute(known).scalars(), *connection.execute(people).scalars()}:
        leave(connection, project, name)
    for table in (candidates, prompts, annotators, remarks, drafts, leases, work, guidelines, invitations, keys):
        connection.execute(delete(table).where(table.c.project == project))
    connection.execute(delete(projects).where(projects.c.name == project))
    return append(connection, project, "erasure", {"what": "project"})
