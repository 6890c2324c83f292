"""Who is in a project, as what, and what stands for them where no name may. Functions of an open connection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, Row, delete, insert, select

from align.annotate.store.queries import annotator_of, close_leases, new_annotator
from align.annotate.store.tables import annotators, invitations, leases, members, users
from align.annotate.store.users import leave, number_of_admins, roles_of, user_named
from align.errors import InputError, require
from align.web.credentials import normalised_name

ROLES = ("annotator", "reviewer", "admin")
"""Each may do what those before it may: judge; see how all judge, and settle what they disagree on; manage."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks.

    Attributes:
        name: the identity of their annotator.
        roles: by project.
    """

    name: str
    roles: Mapping[str, str]

    def may(self, project: str, role: str) -> bool:
        """Whether they have this role in a project, or one above it."""
        mine = self.roles.get(project)
        return mine is not None and ROLES.index(mine) >= ROLES.index(role)


def check_role(role: str) -> None:
    require(role in ROLES, "role", role, "there is no such role", f"Choose one of: {', '.join(ROLES)}.")


def members_of(db: Connection, project: str) -> dict[str, str]:
    """Names and roles of a project, by name."""
    found = select(users.c.name, members.c.role).join(members, members.c.user == users.c.id)
    rows = db.execute(found.where(members.c.project == project).order_by(users.c.name))
    return {row.name: row.role for row in rows}


def assign_role(db: Connection, project: str, user: str, role: str) -> None:
    """Gives a user this role, in place of another."""
    db.execute(delete(members).where(members.c.project == project, members.c.user == user))
    db.execute(insert(members), {"project": project, "user": user, "role": role})


def promote(db: Connection, project: str, user: str, role: str) -> None:
    """Gives a user this role, unless they have a higher one."""
    before = roles_of(db, user).get(project)
    if before is None or ROLES.index(before) < ROLES.index(role):
        assign_role(db, project, user, role)


def member_named(db: Connection, project: str, name: str, role: str | None) -> Row:
    """The user of this name, who may have this role from now on. Raises as `Accounts.set_role` does."""
    user = user_named(db, normalised_name(name))
    before = None if user is None else roles_of(db, user.id).get(project)
    if user is None or before is None:
        raise InputError("name", name, f"nobody of that name is in project {project}", "Check the spelling.")
    last = before == "admin" and role != "admin" and number_of_admins(db, project) == 1
    require(not last, "name", name, "they are the only admin", "Make somebody else one first.")
    return user


def remove_member(db: Connection, project: str, user: Row) -> None:
    """Takes somebody out of a project; what they hold goes back."""
    person = annotator_of(db, project, user.name)
    if person is not None:
        close_leases(db, project, leases.c.annotator == person.pseudonym, "returned")
    leave(db, project, user.name)


def annotator_named(db: Connection, project: str, name: str) -> Row | None:
    """The annotator of this name, as it is spelt or tidied; None for one whom the project has not met."""
    return annotator_of(db, project, name) or annotator_of(db, project, normalised_name(name))


def new_expected_annotator(db: Connection, project: str, name: str) -> Row | None:
    """A new annotator for a member of the project or somebody invited to it by name; None for anybody else."""
    user = user_named(db, normalised_name(name))
    asked = (invitations.c.project == project, invitations.c.name == normalised_name(name))
    known = user is not None and project in roles_of(db, user.id)
    if known or db.execute(select(invitations.c.digest).where(*asked)).first() is not None:
        return new_annotator(db, project, normalised_name(name))
    return None


def name_of_handle(db: Connection, project: str, handle: str) -> str | None:
    """The name that a pseudonym or an account's id stands for; None where it is nobody's (any more)."""
    theirs = (annotators.c.project == project, annotators.c.pseudonym == handle)
    person = select(annotators.c.identity).where(*theirs)
    user = select(users.c.name).where(users.c.id == handle)
    return db.execute(person).scalar() or db.execute(user).scalar()
