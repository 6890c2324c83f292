"""Sessions: opened for a user, prolonged when they come back, ended. Functions of an open connection."""

from __future__ import annotations

from sqlalchemy import Connection, Row, delete, insert, select, update

from align.annotate.store.tables import sessions, users
from align.web.credentials import digest, new_token

SESSION_S = 14 * 86400
"""A session ends when nobody has come for so long."""
PROLONGED_EVERY_S = 3600
"""A write an hour, not one a request."""


def open_session(db: Connection, user: str, now: float) -> str:
    """A new session's token; sessions that are over go."""
    token = new_token()
    db.execute(delete(sessions).where(sessions.c.expires_at < now))
    db.execute(insert(sessions), {"digest": digest(token), "user": user, "expires_at": now + SESSION_S})
    return token


def user_of(db: Connection, session: str, now: float) -> Row | None:
    """The user's id and name, and when the session ends; None where it is none (any more)."""
    found = select(users.c.id, users.c.name, sessions.c.expires_at).join(users, users.c.id == sessions.c.user)
    return db.execute(found.where(sessions.c.digest == digest(session), sessions.c.expires_at > now)).first()


def is_due(expires_at: float, now: float) -> bool:
    """Whether a session is to be prolonged."""
    return expires_at < now + SESSION_S - PROLONGED_EVERY_S


def prolong(db: Connection, session: str, now: float) -> None:
    db.execute(update(sessions).where(sessions.c.digest == digest(session)).values(expires_at=now + SESSION_S))


def end(db: Connection, session: str) -> None:
    db.execute(delete(sessions).where(sessions.c.digest == digest(session)))


def end_all(db: Connection, user: str, but: str = "") -> None:
    """Ends the user's sessions, but for one."""
    db.execute(delete(sessions).where(sessions.c.user == user, sessions.c.digest != digest(but)))
