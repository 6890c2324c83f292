"""Links that let somebody in: what one is for, which are out, and how one ends. Functions of an open connection.

The store keeps the SHA-256 of a link's token, so that whoever reads it can use none; the digest's beginning is the id
by which an admin takes one back.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Row, delete, insert, select

from align.annotate.store.tables import invitations, users
from align.annotate.store.users import is_annotator, roles_of, user_named
from align.errors import InputError
from align.web.credentials import Refused, digest, new_token

INVITATION_S = 7 * 86400
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


def add(db: Connection, project: str, role: str, name: str, made_by: str, now: float, lasts_s: float) -> str:
    """A new link's token; links that are over go.

    Args:
        made_by: the name of an admin; empty: whoever runs the server.
    """
    end_expired(db, now)
    token, maker = new_token(), user_named(db, made_by) if made_by else None
    row = {"digest": digest(token), "project": project, "role": role, "name": name}
    row["made_by"] = "" if maker is None else maker.id
    db.execute(insert(invitations), row | {"expires_at": now + lasts_s})
    return token


def end_expired(db: Connection, now: float) -> None:
    db.execute(delete(invitations).where(invitations.c.expires_at < now))


def end_of_admins(db: Connection, project: str) -> None:
    """Ends the links by which anybody becomes an admin."""
    mine = (invitations.c.project == project, invitations.c.role == "admin", invitations.c.name == "")
    db.execute(delete(invitations).where(*mine))


def end_for(db: Connection, name: str) -> None:
    """Ends the links that are for somebody, in every project."""
    db.execute(delete(invitations).where(invitations.c.name == name))


def end_of_maker(db: Connection, project: str, user: str) -> None:
    """Ends the links to a project that a user made."""
    db.execute(delete(invitations).where(invitations.c.project == project, invitations.c.made_by == user))


def check_may_accept(db: Connection, invitation: Invitation, name: str, user: Row | None) -> None:
    """Raises: Refused: this name, and whoever has it, may not take the invitation with a password."""
    if invitation.name:
        if invitation.name != name:
            raise Refused("name", name, f"the invitation is for {invitation.name}", "Ask for one of your own.")
        if not invitation.resets:
            remedy = "Log in and open the link again; who runs the server can set a new password."
            raise Refused("name", name, "the account is in projects of others too", remedy)
    elif user is not None or is_annotator(db, name):
        remedy = "Choose another; if it is yours, log in and open the link again, or ask for one by this name."
        raise Refused("name", name, "somebody here has that name", remedy)


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
