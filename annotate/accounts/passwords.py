"""Passwords: whose name and password these are, looked at after a wait for those who failed; and how one is set."""

from __future__ import annotations

import math
import secrets
from contextlib import ExitStack

from sqlalchemy import Connection, Row, insert, update

from align.annotate.store import Store
from align.annotate.store.tables import users
from align.annotate.store.users import user_named
from align.web.credentials import Passwords, Refused, is_name, network, normalised_name
from align.web.throttle import Throttle

TRIES, TRIES_MANY = 5, 50
"""Wrong passwords that cost no wait: for a name from one network; for a name, or from a network, in all."""


def verified_user(store: Store, passwords: Passwords, tries: Throttle, name: str, password: str, address: str) -> Row:
    """The user whose name and password these are. Raises as `Accounts.log_in`. What was not looked at did not fail."""
    name, place = normalised_name(name), network(address)
    here = f"name {name[:100]} from {place}"
    tried = ((here, TRIES), (f"name {name[:100]}", TRIES_MANY), (f"from {place}", TRIES_MANY))
    failures = tries.failures(f"from {place}")
    with ExitStack() as unseen:
        for what, free in tried:
            wait = tries.attempt(what, free)
            if wait > 0:
                problem = f"too many attempts; the next counts in {math.ceil(wait)} s"
                raise Refused("name", name, problem, "Wait, then try again.")
            unseen.callback(tries.forgive, what)
        user = None
        if is_name(name):  # what nobody can be called no database is asked
            with store.reading() as db:
                user = user_named(db, name)
        matches = passwords.matches(None if user is None else user.password, password, place, failures)
        unseen.pop_all()
    if user is None or not matches:
        raise Refused("name", name, "no such name and password", "Check both; an admin can send a new link.")
    tries.succeeded(here)
    for what, _ in tried[1:]:
        tries.forgive(what)
    return user


def set_password(db: Connection, user: Row, kept: str) -> None:
    """Of a user who proved themselves a moment ago; `kept` is a hash.

    Raises:
        Refused: the password has been set anew since, or the account is gone.
    """
    still = (users.c.id == user.id, users.c.password == user.password)
    if db.execute(update(users).where(*still).values(password=kept)).rowcount == 0:
        raise Refused("name", user.name, "the password was set anew meanwhile", "Log in with the new one.")


def replace_password(db: Connection, id: str, kept: str) -> None:
    """Of a user who proved themselves by an invitation."""
    db.execute(update(users).where(users.c.id == id).values(password=kept))


def new_user(db: Connection, name: str, kept: str, now: float) -> str:
    """Makes an account; returns its id."""
    id = secrets.token_hex(16)
    db.execute(insert(users), {"id": id, "name": name, "password": kept, "created_at": now})
    return id
