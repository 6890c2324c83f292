"""Erasure: contents and names go, and a tombstone in the ledger says so. Functions of an open connection."""

from __future__ import annotations

from sqlalchemy import Connection, Row, delete, exists, func, select, true

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
from align.core.errors import InputError


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


def user_named(connection: Connection, name: str) -> Row | None:
    return connection.execute(select(users).where(users.c.name == name)).first()


def roles_of(connection: Connection, user: str) -> dict[str, str]:
    """By project, by name."""
    mine = select(members.c.project, members.c.role).where(members.c.user == user).order_by(members.c.project)
    return {row.project: row.role for row in connection.execute(mine)}


def number_of_admins(connection: Connection, project: str) -> int:
    admins = (members.c.project == project, members.c.role == "admin")
    return connection.execute(select(func.count()).select_from(members).where(*admins)).scalar_one()


def is_annotator(connection: Connection, name: str) -> bool:
    """Whether somebody of this name, in small letters, has judged in any project, with an account or without."""
    theirs = select(annotators.c.pseudonym).where(func.lower(annotators.c.identity) == name)
    return connection.execute(theirs.limit(1)).first() is not None


def leave(connection: Connection, project: str, name: str) -> None:
    """Takes somebody out of a project, with the links that they made or that are for them; their account goes, with its
    sessions, where it is in no project any more."""
    of_project = invitations.c.project == project
    user = user_named(connection, name)
    if user is not None:
        connection.execute(delete(members).where(members.c.project == project, members.c.user == user.id))
        connection.execute(delete(invitations).where(of_project, invitations.c.made_by == user.id))
        elsewhere = exists().where(members.c.user == user.id)
        if connection.execute(delete(users).where(users.c.id == user.id, ~elsewhere)).rowcount:
            of_project = true()
    connection.execute(delete(invitations).where(of_project, invitations.c.name == name))
