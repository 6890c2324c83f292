"""Links that let somebody in: what one is for, which are out, and how one ends. Functions of an open connection.

The store keeps the SHA-256 of a link's token, so that whoever reads it can use none; the digest's beginning is the id
by which an admin takes one back.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, select

from align.errors import InputError
from align.web.credentials import Refused, digest
from annotate.store.people import roles_of, user_named
from annotate.store.tables import invitations, users

ID_LENGTH = 12


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a link is for.

    Attributes:
        name: whom; empty: whoever has it chooses one.
        resets: whether it may set the password of that name: there is no such account yet, or whoever made it manages
            every project that the account is in. Else it only lets join who logs in.
        known: whether there is an account of that name.
    """

    project: str
    role: str
    name: str
    resets: bool
    known: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """A link that is out.

    Attributes:
        name: whom it is for; empty: whoever has it.
        made_by: the name of the admin; empty: whoever runs the server.
        expires_at: seconds since 1970.
    """

    id: str
    role: str
    name: str
    made_by: str
    expires_at: float


def invitation_of(db: Connection, token: str, now: float) -> Invitation | None:
    """What a link is for; None where it is none (any more)."""
    valid = (invitations.c.digest == digest(token), invitations.c.expires_at > now)
    row = db.execute(select(invitations).where(*valid)).first()
    if row is None:
        return None
    user = user_named(db, row.name)
    theirs = {} if user is None else roles_of(db, user.id)
    managed = roles_of(db, row.made_by) if row.made_by else dict.fromkeys(theirs, "admin")
    resets = all(managed.get(project) == "admin" for project in theirs)
    return Invitation(row.project, row.role, row.name, resets, user is not None)


def used(db: Connection, token: str, now: float) -> Invitation:
    """What a link is for, which ends by that. Raises: Refused: it is none (any more)."""
    found = invitation_of(db, token, now)
    if found is None:
        raise over()
    db.execute(delete(invitations).where(invitations.c.digest == digest(token)))
    return found


def pending(db: Connection, project: str, now: float) -> list[Pending]:
    """The links of a project that are good still, by when they end."""
    maker = users.c.name.label("maker")
    found = select(invitations, maker).outerjoin(users, users.c.id == invitations.c.made_by)
    out = found.where(invitations.c.project == project, invitations.c.expires_at > now)
    rows = db.execute(out.order_by(invitations.c.expires_at, invitations.c.digest))
    return [Pending(row.digest[:ID_LENGTH], row.role, row.name, row.maker or "", row.expires_at) for row in rows]


def revoke(db: Connection, project: str, id: str) -> None:
    """Ends a link. Raises: InputError: the project has none of that id (any more)."""
    this = (invitations.c.project == project, invitations.c.digest.startswith(id, autoescape=True))
    ended = db.execute(delete(invitations).where(*this)).rowcount if len(id) == ID_LENGTH else 0
    if ended == 0:
        raise InputError("link", id, "it was used, or has ended", "Look at the list again.")


def over() -> Refused:
    return Refused("token", "(not shown)", "the invitation is over or was used", "Ask for a new one.")
