"""Who has an account, and what they may do in which project: functions of an open connection."""

from __future__ import annotations

from sqlalchemy import Connection, Row, delete, exists, func, select, true

from align.annotate.store.tables import annotators, invitations, members, users


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
