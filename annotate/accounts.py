"""Accounts: who may come in, and what they may do in which project.

    accounts = Accounts(store)
    token = accounts.invite("greetings", "annotator")       # a link, once
    session = accounts.accept(token, "ann", "correct horse battery")
    accounts.who(session)                                   # Person("ann", {"greetings": "annotator"})

Nobody has a password that they did not choose: an account begins, and a password is set anew, by an invitation.
Passwords are kept as argon2id hashes (RFC 9106), sessions and invitations as SHA-256 of their random tokens.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from argon2 import PasswordHasher
from sqlalchemy import Connection, Row, delete, insert, select, update

from align.errors import InputError, require
from align.web.credentials import (
    Passwords,
    Refused,
    checked_name,
    checked_password,
    digest,
    is_name,
    network,
    new_token,
    tidy,
)
from align.web.throttle import Throttle
from annotate.invitations import Invitation, Pending, invitation_of, over, pending, revoke, used
from annotate.store import Store
from annotate.store.people import is_annotator, leave, number_of_admins, roles_of, user_named
from annotate.store.queries import annotator_of, check_project, close_leases, meet
from annotate.store.tables import annotators, invitations, leases, members, sessions, users

ROLES = ("annotator", "reviewer", "admin")
"""Each may do what those before it may: judge; see how all judge, and settle what they disagree on; manage."""
SESSION_S = 14 * 86400
"""A session ends when nobody has come for so long."""
INVITATION_S = 7 * 86400
TRIES, TRIES_MANY = 5, 50
"""Wrong passwords that cost no wait: for a name from one network; for a name, or from a network, in all."""


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


class Accounts:
    """The accounts of one store. Safe to share between threads.

    Args:
        clock: seconds since 1970.
        hasher: of passwords; the default takes 64 MiB and some 0.1 s each.
    """

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.time, hasher: PasswordHasher | None = None
    ) -> None:
        self.store, self.clock, self.passwords = store, clock, Passwords(hasher or PasswordHasher())
        self._tries = Throttle(time.monotonic)

    # Coming in

    def log_in(self, name: str, password: str, address: str) -> str:
        """A new session's token.

        Args:
            address: where the attempt comes from; failures of a name and of an address each cost a wait.

        Raises:
            Refused: no such name and password, or too many attempts.
            Busy: come back in a moment.
        """
        user = self._proved(name, password, address)
        stale = self.passwords.stale(user.password)
        kept = self.passwords.hashed(password) if stale else user.password
        with self.store.transaction() as db:
            self._set_password(db, user, kept)
            return self._open_session(db, user.id)

    def who(self, session: str) -> Person | None:
        """Whose session it is; None where it is none (any more). Coming back keeps it open."""
        now, mine = self.clock(), sessions.c.digest == digest(session)
        with self.store.reading() as db:
            found = select(users.c.id, users.c.name, sessions.c.expires_at).join(users, users.c.id == sessions.c.user)
            row = db.execute(found.where(mine, sessions.c.expires_at > now)).first()
            if row is None:
                return None
            person = Person(row.name, roles_of(db, row.id))
        if row.expires_at < now + SESSION_S - 3600:  # a write an hour, not one a request
            with self.store.transaction() as db:
                db.execute(update(sessions).where(mine).values(expires_at=now + SESSION_S))
        return person

    def log_out(self, session: str) -> None:
        with self.store.transaction() as db:
            db.execute(delete(sessions).where(sessions.c.digest == digest(session)))

    def change_password(self, session: str, old: str, new: str) -> None:
        """Sets another password, and ends the person's other sessions.

        Raises:
            Refused: the old one is not theirs, or too many attempts.
            InputError: the new one is too short or too long.
        """
        person = self.who(session)
        if person is None:
            raise Refused("session", "(not shown)", "it is over", "Log in again.")
        user = self._proved(person.name, old, f"session of {person.name}")
        kept = self.passwords.hashed(checked_password(person.name, new))
        with self.store.transaction() as db:
            self._set_password(db, user, kept)
            db.execute(delete(invitations).where(invitations.c.name == person.name))
            db.execute(delete(sessions).where(sessions.c.user == user.id, sessions.c.digest != digest(session)))

    # Invitations

    def invite(
        self, project: str, role: str, name: str = "", lasts_s: float = INVITATION_S, by: Person | None = None
    ) -> str:
        """A token that lets somebody in, once.

        Args:
            name: whom it is for; of somebody who has an account it sets a new password, and the role. Empty: whoever
                has it chooses a name.
            by: an admin of the project; None: the operator of the server.

        Raises:
            InputError: unknown project or role, or a name that nobody can have.
        """
        require(role in ROLES, "role", role, "there is no such role", f"Choose one of: {', '.join(ROLES)}.")
        name, token = checked_name(name) if name else "", new_token()
        with self.store.transaction() as db:
            check_project(db, project)
            db.execute(delete(invitations).where(invitations.c.expires_at < self.clock()))
            maker = None if by is None else user_named(db, by.name)
            row = {"digest": digest(token), "project": project, "role": role, "name": name}
            row["made_by"] = "" if maker is None else maker.id
            db.execute(insert(invitations), row | {"expires_at": self.clock() + lasts_s})
        return token

    def first_admin(self, project: str) -> str | None:
        """An invitation for the project's first admin, which replaces any before it; None where there is one."""
        with self.store.transaction() as db:
            db.execute(delete(invitations).where(invitations.c.expires_at < self.clock()))
            if number_of_admins(db, project):
                return None
            earlier = (invitations.c.project == project, invitations.c.role == "admin", invitations.c.name == "")
            db.execute(delete(invitations).where(*earlier))
            return self.invite(project, "admin", lasts_s=86400)

    def invited(self, token: str) -> Invitation | None:
        """What an invitation is for; None where it is none (any more)."""
        with self.store.reading() as db:
            return invitation_of(db, token, self.clock())

    def pending(self, project: str) -> list[Pending]:
        """The invitations to a project that are good still, the newest last."""
        with self.store.reading() as db:
            return pending(db, project, self.clock())

    def revoke(self, project: str, id: str) -> None:
        """Ends an invitation. Raises: InputError: the project has none of that id (any more)."""
        with self.store.transaction() as db:
            revoke(db, project, id)

    def accept(self, token: str, name: str, password: str) -> str:
        """Makes the account, or sets its new password (which ends its sessions), gives the role, and opens a session.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else; or somebody has the name.
            InputError: a name or password that nobody can have.
        """
        if self.invited(token) is None:  # before a password is hashed for whoever comes by
            raise over()
        name = checked_name(name)
        kept = self.passwords.hashed(checked_password(name, password))
        with self.store.transaction() as db:
            invitation = used(db, token, self.clock())
            user = user_named(db, name)
            if invitation.name:
                if invitation.name != name:
                    raise Refused("name", name, f"the invitation is for {invitation.name}", "Ask for one of your own.")
                if not invitation.resets:
                    remedy = "Log in and open the link again; who runs the server can set a new password."
                    raise Refused("name", name, "the account is in projects of others too", remedy)
            elif user is not None or is_annotator(db, name):
                remedy = "Choose another; if it is yours, log in and open the link again, or ask for one by this name."
                raise Refused("name", name, "somebody here has that name", remedy)
            if user is None:
                id = secrets.token_hex(16)
                db.execute(insert(users), {"id": id, "name": name, "password": kept, "created_at": self.clock()})
            else:
                id = user.id
                db.execute(update(users).where(users.c.id == id).values(password=kept))
                db.execute(delete(sessions).where(sessions.c.user == id))
            db.execute(delete(invitations).where(invitations.c.name == name))
            self._promote(db, invitation, id)
            return self._open_session(db, id)

    def join(self, token: str, person: Person) -> None:
        """Gives somebody who has an account the role of an invitation.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else.
        """
        with self.store.transaction() as db:
            invitation, user = used(db, token, self.clock()), user_named(db, person.name)
            if user is None or invitation.name not in ("", person.name):
                raise Refused("token", "(not shown)", "the invitation is for somebody else", "Ask for one of your own.")
            self._promote(db, invitation, user.id)

    # Members

    def members(self, project: str) -> dict[str, str]:
        """Names and roles of a project, by name."""
        with self.store.reading() as db:
            found = select(users.c.name, members.c.role).join(members, members.c.user == users.c.id)
            rows = db.execute(found.where(members.c.project == project).order_by(users.c.name))
            return {row.name: row.role for row in rows}

    def pseudonym(self, project: str, name: str) -> str:
        """Of somebody who has judged in a project, or is a member of it or invited to it by name: who was not met yet
        gets one.

        Raises:
            InputError: nobody of that name is known there.
        """
        with self.store.transaction() as db:
            person = annotator_of(db, project, name) or annotator_of(db, project, tidy(name))
            if person is None:
                user = user_named(db, tidy(name))
                asked = (invitations.c.project == project, invitations.c.name == tidy(name))
                known = user is not None and project in roles_of(db, user.id)
                if known or db.execute(select(invitations.c.digest).where(*asked)).first() is not None:
                    person = meet(db, project, tidy(name))
        return self.store.known(project, name) if person is None else person.pseudonym

    def handle(self, project: str, name: str) -> str:
        """What stands for somebody where no name may: their pseudonym in a project, or else their account's id.

        Raises:
            InputError: nobody of that name has judged in the project or has an account.
        """
        with self.store.reading() as db:
            person = annotator_of(db, project, name) or annotator_of(db, project, tidy(name))
            user = user_named(db, tidy(name))
        if person is not None:
            return person.pseudonym
        if user is None:
            remedy = "Leave the name out: whoever opens the link chooses one."
            raise InputError("annotator", name, "nobody of that name has an account", remedy)
        return user.id

    def behind(self, project: str, handle: str) -> str:
        """The name behind a handle. Raises: InputError: nobody's."""
        with self.store.reading() as db:
            theirs = (annotators.c.project == project, annotators.c.pseudonym == handle)
            person = select(annotators.c.identity).where(*theirs)
            user = select(users.c.name).where(users.c.id == handle)
            found = db.execute(person).scalar() or db.execute(user).scalar()
        if found is None:
            raise InputError("annotator", handle, "it stands for nobody (any more)", "Give the name.")
        return found

    def set_role(self, project: str, name: str, role: str | None) -> None:
        """Changes somebody's role in a project; None takes them out of it, and what they hold goes back.

        Raises:
            InputError: unknown role or member, or the project would be left without an admin.
        """
        known = role is None or role in ROLES
        require(known, "role", role, "there is no such role", f"Choose one of: {', '.join(ROLES)}.")
        with self.store.transaction() as db:
            user = user_named(db, tidy(name))
            before = None if user is None else roles_of(db, user.id).get(project)
            if user is None or before is None:
                raise InputError("name", name, f"nobody of that name is in project {project}", "Check the spelling.")
            last = before == "admin" and role != "admin" and number_of_admins(db, project) == 1
            require(not last, "name", name, "they are the only admin", "Make somebody else one first.")
            if role is None:
                person = annotator_of(db, project, user.name)
                if person is not None:
                    close_leases(db, project, leases.c.annotator == person.pseudonym, "returned")
                leave(db, project, user.name)
                self.store.erased()
                return
            if role != "admin":
                mine = (invitations.c.project == project, invitations.c.made_by == user.id)
                db.execute(delete(invitations).where(*mine))
            self._give(db, project, user.id, role)

    # Rows

    def _promote(self, db: Connection, invitation: Invitation, user: str) -> None:
        """Gives the role of an invitation, unless they have a higher one."""
        before = roles_of(db, user).get(invitation.project)
        if before is None or ROLES.index(before) < ROLES.index(invitation.role):
            self._give(db, invitation.project, user, invitation.role)

    def _give(self, db: Connection, project: str, user: str, role: str) -> None:
        db.execute(delete(members).where(members.c.project == project, members.c.user == user))
        db.execute(insert(members), {"project": project, "user": user, "role": role})

    def _open_session(self, db: Connection, user: str) -> str:
        token, now = new_token(), self.clock()
        db.execute(delete(sessions).where(sessions.c.expires_at < now))
        db.execute(insert(sessions), {"digest": digest(token), "user": user, "expires_at": now + SESSION_S})
        return token

    # Passwords

    def _proved(self, name: str, password: str, address: str) -> Row:
        """The user whose name and password these are. Raises as `log_in` does. What was not looked at did not fail."""
        name, place = tidy(name), network(address)
        here = f"name {name[:100]} from {place}"
        tried = ((here, TRIES), (f"name {name[:100]}", TRIES_MANY), (f"from {place}", TRIES_MANY))
        failures = self._tries.failures(f"from {place}")
        with ExitStack() as unseen:
            for what, free in tried:
                wait = self._tries.attempt(what, free)
                if wait > 0:
                    problem = f"too many attempts; the next counts in {math.ceil(wait)} s"
                    raise Refused("name", name, problem, "Wait, then try again.")
                unseen.callback(self._tries.forgive, what)
            user = None
            if is_name(name):  # what nobody can be called no database is asked
                with self.store.reading() as db:
                    user = user_named(db, name)
            matches = self.passwords.matches(None if user is None else user.password, password, place, failures)
            unseen.pop_all()
        if user is None or not matches:
            raise Refused("name", name, "no such name and password", "Check both; an admin can send a new link.")
        self._tries.succeeded(here)
        for what, _ in tried[1:]:
            self._tries.forgive(what)
        return user

    def _set_password(self, db: Connection, user: Row, kept: str) -> None:
        """Of a user who proved themselves a moment ago.

        Raises:
            Refused: the password has been set anew since, or the account is gone.
        """
        still = (users.c.id == user.id, users.c.password == user.password)
        if db.execute(update(users).where(*still).values(password=kept)).rowcount == 0:
            raise Refused("name", user.name, "the password was set anew meanwhile", "Log in with the new one.")
