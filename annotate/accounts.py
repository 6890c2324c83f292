"""Accounts: who may come in, and what they may do in which project.

    accounts = Accounts(store)
    token = accounts.invite("greetings", "annotator")       # a link, once
    session = accounts.accept(token, "ann", "correct horse battery")
    accounts.who(session)                                   # Person("ann", {"greetings": "annotator"})

Nobody has a password that they did not choose: an account begins, and a password is set anew, by an invitation.
Passwords are kept as argon2id hashes (RFC 9106), sessions and invitations as SHA-256 of their random tokens.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from sqlalchemy import Connection, Row, delete, insert, select, update

from align.errors import InputError, require
from annotate.store import Store
from annotate.store.people import is_annotator, leave, number_of_admins, roles_of, user_named
from annotate.store.queries import annotator_of, check_project, close_leases
from annotate.store.tables import annotators, invitations, leases, members, sessions, users
from annotate.throttle import Throttle

ROLES = ("annotator", "reviewer", "admin")
"""Each may do what those before it may: judge; see how all judge, and settle what they disagree on; manage."""
SESSION_S = 14 * 86400
"""A session ends when nobody has come for so long."""
INVITATION_S = 7 * 86400
SHORTEST_PASSWORD = 12
AT_ONCE = 2
"""Passwords that are hashed at a time: each takes 64 MiB."""


class Refused(InputError):
    """Somebody may not come in."""


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


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a link is for. `name` is empty where whoever has it chooses one."""

    project: str
    role: str
    name: str


class Accounts:
    """The accounts of one store. Safe to share between threads.

    Args:
        clock: seconds since 1970.
        hasher: of passwords; the default takes 64 MiB and some 0.1 s each.
    """

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.time, hasher: PasswordHasher | None = None
    ) -> None:
        self.store, self.clock, self.hasher = store, clock, hasher or PasswordHasher()
        self._tries = Throttle(time.monotonic)
        self._slots = threading.Semaphore(AT_ONCE)
        # An unknown name takes as long as a known one.
        self._nobodys = self.hasher.hash(secrets.token_hex(16))

    # Coming in

    def log_in(self, name: str, password: str, address: str) -> str:
        """A new session's token.

        Args:
            address: where the attempt comes from; failures of a name and of an address each cost a wait.

        Raises:
            Refused: no such name and password, or too many attempts.
        """
        user = self._proved(name, password, address)
        with self.store.transaction() as db:
            if self.hasher.check_needs_rehash(user.password):
                db.execute(update(users).where(users.c.id == user.id).values(password=self._hashed(password)))
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
        kept = self._hashed(checked(person.name, new))
        with self.store.transaction() as db:
            db.execute(update(users).where(users.c.id == user.id).values(password=kept))
            db.execute(delete(sessions).where(sessions.c.user == user.id, sessions.c.digest != digest(session)))

    # Invitations

    def invite(self, project: str, role: str, name: str = "", lasts_s: float = INVITATION_S) -> str:
        """A token that lets somebody in, once.

        Args:
            name: whom it is for; of somebody who has an account it sets a new password, and the role. Empty: whoever
                has it chooses a name.

        Raises:
            InputError: unknown project or role, or a name that nobody can have.
        """
        require(role in ROLES, "role", role, "there is no such role", f"Choose one of: {', '.join(ROLES)}.")
        name, token = named(name) if name else "", secrets.token_urlsafe(32)
        with self.store.transaction() as db:
            check_project(db, project)
            db.execute(delete(invitations).where(invitations.c.expires_at < self.clock()))
            row = {"digest": digest(token), "project": project, "role": role, "name": name}
            db.execute(insert(invitations), row | {"expires_at": self.clock() + lasts_s})
        return token

    def first_admin(self, project: str) -> str | None:
        """An invitation for the project's first admin, which replaces any before it; None where there is one."""
        with self.store.transaction() as db:
            if number_of_admins(db, project):
                return None
            earlier = (invitations.c.project == project, invitations.c.role == "admin", invitations.c.name == "")
            db.execute(delete(invitations).where(*earlier))
            return self.invite(project, "admin", lasts_s=86400)

    def invited(self, token: str) -> Invitation | None:
        """What an invitation is for; None where it is none (any more)."""
        with self.store.reading() as db:
            return self._invitation(db, token)

    def accept(self, token: str, name: str, password: str) -> str:
        """Makes the account, or sets its new password (which ends its sessions), gives the role, and opens a session.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else; or somebody has the name.
            InputError: a name or password that nobody can have.
        """
        name = named(name)
        kept = self._hashed(checked(name, password))
        with self.store.transaction() as db:
            invitation = self._used(db, token)
            user = user_named(db, name)
            if invitation.name:
                theirs = invitation.name == name
                if not theirs:
                    raise Refused("name", name, f"the invitation is for {invitation.name}", "Ask for one of your own.")
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
            self._raise(db, invitation, id)
            return self._open_session(db, id)

    def join(self, token: str, person: Person) -> None:
        """Gives somebody who has an account the role of an invitation.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else.
        """
        with self.store.transaction() as db:
            invitation, user = self._used(db, token), user_named(db, person.name)
            if user is None or invitation.name not in ("", person.name):
                raise Refused("token", "(not shown)", "the invitation is for somebody else", "Ask for one of your own.")
            self._raise(db, invitation, user.id)

    # Members

    def members(self, project: str) -> dict[str, str]:
        """Names and roles of a project, by name."""
        with self.store.reading() as db:
            found = select(users.c.name, members.c.role).join(members, members.c.user == users.c.id)
            rows = db.execute(found.where(members.c.project == project).order_by(users.c.name))
            return {row.name: row.role for row in rows}

    def handle(self, project: str, name: str) -> str:
        """What stands for somebody where no name may: their pseudonym in a project, or else their account's id.

        Raises:
            InputError: nobody of that name has judged in the project or has an account.
        """
        with self.store.reading() as db:
            person, user = (
                annotator_of(db, project, name) or annotator_of(db, project, tidy(name)),
                user_named(db, tidy(name)),
            )
        if person is not None:
            return person.pseudonym
        if user is None:
            remedy = "Leave the name out: whoever opens the link chooses one."
            raise InputError("annotator", name, "nobody of that name has an account", remedy)
        return user.id

    def behind(self, project: str, handle: str) -> str:
        """The name behind a handle. Raises: InputError: nobody's."""
        with self.store.reading() as db:
            person = select(annotators.c.identity).where(
                annotators.c.project == project, annotators.c.pseudonym == handle
            )
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
            else:
                self._give(db, project, user.id, role)

    # Rows

    def _invitation(self, db: Connection, token: str) -> Invitation | None:
        valid = (invitations.c.digest == digest(token), invitations.c.expires_at > self.clock())
        row = db.execute(select(invitations).where(*valid)).first()
        return None if row is None else Invitation(row.project, row.role, row.name)

    def _used(self, db: Connection, token: str) -> Invitation:
        found = self._invitation(db, token)
        if found is None:
            raise Refused("token", "(not shown)", "the invitation is over or was used", "Ask for a new one.")
        db.execute(delete(invitations).where(invitations.c.digest == digest(token)))
        return found

    def _raise(self, db: Connection, invitation: Invitation, user: str) -> None:
        """Gives the role of an invitation, unless they have a higher one."""
        before = roles_of(db, user).get(invitation.project)
        if before is None or ROLES.index(before) < ROLES.index(invitation.role):
            self._give(db, invitation.project, user, invitation.role)

    def _give(self, db: Connection, project: str, user: str, role: str) -> None:
        db.execute(delete(members).where(members.c.project == project, members.c.user == user))
        db.execute(insert(members), {"project": project, "user": user, "role": role})

    def _open_session(self, db: Connection, user: str) -> str:
        token, now = secrets.token_urlsafe(32), self.clock()
        db.execute(delete(sessions).where(sessions.c.expires_at < now))
        db.execute(insert(sessions), {"digest": digest(token), "user": user, "expires_at": now + SESSION_S})
        return token

    # Passwords

    def _proved(self, name: str, password: str, address: str) -> Row:
        """The user whose name and password these are. Raises as `log_in` does."""
        name = tidy(name)
        tried = (f"name {name}", f"address {address}")
        wait = max(map(self._tries.wait, tried))
        if wait > 0:
            raise Refused("name", name, f"too many attempts; the next counts in {wait:.0f} s", "Wait, then try again.")
        with self.store.reading() as db:
            user = user_named(db, name)
        matches = self._matches(self._nobodys if user is None else user.password, password)
        if user is None or not matches:
            for what in tried:
                self._tries.failed(what)
            raise Refused("name", name, "no such name and password", "Check both; an admin can send a new link.")
        self._tries.succeeded(tried[0])
        return user

    def _hashed(self, password: str) -> str:
        with self._slots:
            return self.hasher.hash(password)

    def _matches(self, kept: str, password: str) -> bool:
        try:
            with self._slots:
                return self.hasher.verify(kept, password[:1000])
        except VerificationError:
            return False


def digest(token: str) -> str:
    """Of a random token of 256 bits: nothing slower is needed."""
    return hashlib.sha256(token.encode()).hexdigest()


def tidy(name: str) -> str:
    """A name as it is compared: look-alikes of one letter, and capitals, are one."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def named(name: str) -> str:
    """A name that somebody can have, tidied.

    Raises:
        InputError: it is empty, too long, or holds what cannot be seen.
    """
    name = tidy(name)
    require(0 < len(name) <= 100, "name", name, "it is empty or too long", "Give 1 to 100 characters.")
    seen = all(letter == " " or not unicodedata.category(letter).startswith(("C", "Z")) for letter in name)
    require(seen, "name", name, "it holds what cannot be seen", "Use letters, digits and signs.")
    return name


def checked(name: str, password: str) -> str:
    """A password that may be chosen (NIST SP 800-63B: length is what counts, no rule of composition).

    Raises:
        InputError: it is too short, too long, or the name.
    """
    good = SHORTEST_PASSWORD <= len(password) <= 1000
    require(
        good, "password", "(not shown)", "it is too short or too long", f"Give {SHORTEST_PASSWORD} or more letters."
    )
    require(tidy(password) != name, "password", "(not shown)", "it is the name", "Choose another.")
    return password
