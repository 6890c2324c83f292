"""Accounts: who may come in, and what they may do in which project. Each request is one transaction.

    accounts = Accounts(store)
    token = accounts.invite("greetings", "annotator")       # a link, once
    session = accounts.accept(token, "ann", "correct horse battery")
    accounts.who(session)                                   # Person("ann", {"greetings": "annotator"})

Nobody has a password that they did not choose: an account begins, and a password is set anew, by an invitation.
Passwords are kept as argon2id hashes (RFC 9106). Of sessions and invitations the store keeps the SHA-256 of their
random tokens, so that a reader of the store cannot use them. The beginning of an invitation's digest is the id by which
an admin revokes it.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from argon2 import PasswordHasher
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from align.annotate.store import Store
from align.annotate.store.database import unknown_annotator
from align.annotate.store.erasure import remove_member, user_named
from align.annotate.store.ledger import annotator_of, check_project, close_leases, ensure_annotator
from align.annotate.store.projects import check_not_erased
from align.annotate.store.tables import annotators, invitations, leases, members, sessions, users
from align.core.errors import InputError, require
from align.web.credentials import (
    Passwords,
    Refused,
    checked_name,
    checked_password,
    digest,
    is_name,
    network,
    new_token,
    normalised_name,
)
from align.web.throttle import Throttle

ROLES = ("annotator", "reviewer", "admin")
"""Each may do what those before it may: judge; see how all judge, and settle what they disagree on; manage."""
SESSION_S = 14 * 86400
"""A session ends if its owner does not come for so long."""
PROLONGED_EVERY_S = 3600
"""A session is prolonged once an hour, so that not every request writes."""
INVITATION_S = 7 * 86400
ID_LENGTH = 12
"""Digits of an invitation's digest that are its id."""
TRIES, TRIES_MANY = 5, 50
"""Wrong passwords that cost no wait: for a name from one network; for a name, or from a network, in all."""


@dataclass(frozen=True, slots=True)
class Person:
    """A person who is logged in.

    Attributes:
        name: the identity of their annotator.
        roles: by project.
    """

    name: str
    roles: Mapping[str, str]

    def may(self, project: str, role: str) -> bool:
        """Return whether they have this role in a project, or one above it."""
        mine = self.roles.get(project)
        return mine is not None and ROLES.index(mine) >= ROLES.index(role)


@dataclass(frozen=True, slots=True)
class Invitation:
    """The project and the role that an invitation gives.

    Attributes:
        name: the person's; empty if its holder chooses one.
        resets: whether it may set the password of that name: there is no such account yet, or its maker manages every
            project that the account is in. Otherwise it only lets join who logs in.
        known: whether there is an account of that name.
    """

    project: str
    role: str
    name: str
    resets: bool
    known: bool


@dataclass(frozen=True, slots=True)
class Pending:
    """An invitation that can still be accepted.

    Attributes:
        name: the person's; empty if its holder chooses one.
        made_by: the name of the admin; empty for the operator of the server.
        expires_at: seconds since 1970.
    """

    id: str
    role: str
    name: str
    made_by: str
    expires_at: float


class Accounts:
    """The accounts of one store. Safe to share between threads.

    Args:
        clock: seconds since 1970.
        hasher: of passwords; the default takes 64 MiB and some 0.1 s each.
    """

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.time, hasher: PasswordHasher | None = None
    ) -> None:
        self.store = store
        self.clock = clock
        self.passwords = Passwords(hasher or PasswordHasher())
        self._tries = Throttle(time.monotonic)

    # Sessions and passwords

    def log_in(self, name: str, password: str, address: str) -> str:
        """Return the token of a new session.

        Args:
            address: where the attempt comes from; failures of a name and of an address each cost a wait.

        Raises:
            Refused: no such name and password, or too many attempts.
            Busy: come back in a moment.
        """
        user = self._verify_password(name, password, address)
        stale = self.passwords.stale(user.password)
        kept = self.passwords.hashed(password) if stale else user.password
        with self.store.transaction() as db:
            set_password(db, user, kept)
            return self._open_session(db, user.id)

    def who(self, session: str) -> Person | None:
        """Return the person of a session, which is prolonged; None if there is no such session (any more)."""
        now = self.clock()
        found = select(users.c.id, users.c.name, sessions.c.expires_at).join(users, users.c.id == sessions.c.user)
        this = sessions.c.digest == digest(session)
        with self.store.reading() as db:
            user = db.execute(found.where(this, sessions.c.expires_at > now)).first()
            if user is None:
                return None
            person = Person(user.name, roles_of(db, user.id))
        if user.expires_at < now + SESSION_S - PROLONGED_EVERY_S:
            with self.store.transaction() as db:
                db.execute(update(sessions).where(this).values(expires_at=now + SESSION_S))
        return person

    def log_out(self, session: str) -> None:
        with self.store.transaction() as db:
            db.execute(delete(sessions).where(sessions.c.digest == digest(session)))

    def change_password(self, session: str, old: str, new: str) -> None:
        """Set another password, and end the person's other sessions.

        Raises:
            Refused: the old one is not theirs, or too many attempts.
            InputError: the new one is too short or too long.
        """
        person = self.who(session)
        if person is None:
            raise Refused("session", "(not shown)", "it is over", "Log in again.")
        user = self._verify_password(person.name, old, f"session of {person.name}")
        kept = self.passwords.hashed(checked_password(person.name, new))
        with self.store.transaction() as db:
            set_password(db, user, kept)
            db.execute(delete(invitations).where(invitations.c.name == person.name))
            db.execute(delete(sessions).where(sessions.c.user == user.id, sessions.c.digest != digest(session)))

    def _verify_password(self, name: str, password: str, address: str) -> Row:
        """Return the user whose name and password these are. Raises as `log_in`. An attempt that could not be verified
        is no failure."""
        name = normalised_name(name)
        place = network(address)
        here = f"name {name[:100]} from {place}"
        tried = ((here, TRIES), (f"name {name[:100]}", TRIES_MANY), (f"from {place}", TRIES_MANY))
        failures = self._tries.failures(f"from {place}")
        with ExitStack() as unverified:
            for what, free in tried:
                wait = self._tries.attempt(what, free)
                if wait > 0:
                    problem = f"too many attempts; the next counts in {math.ceil(wait)} s"
                    raise Refused("name", name, problem, "Wait, then try again.")
                unverified.callback(self._tries.forgive, what)
            user = None
            if is_name(name):  # the database is not asked for what cannot be a name
                with self.store.reading() as db:
                    user = user_named(db, name)
            matches = self.passwords.matches(None if user is None else user.password, password, place, failures)
            unverified.pop_all()
        if user is None or not matches:
            raise Refused("name", name, "no such name and password", "Check both; an admin can send a new link.")
        self._tries.succeeded(here)
        for what, _ in tried[1:]:
            self._tries.forgive(what)
        return user

    def _open_session(self, db: Connection, user: str) -> str:
        """Return a new session's token, and delete the sessions that are over."""
        token = new_token()
        now = self.clock()
        db.execute(delete(sessions).where(sessions.c.expires_at < now))
        db.execute(insert(sessions), {"digest": digest(token), "user": user, "expires_at": now + SESSION_S})
        return token

    # Invitations

    def invite(
        self, project: str, role: str, name: str = "", lasts_s: float = INVITATION_S, by: Person | None = None
    ) -> str:
        """Return a token that lets somebody in, once.

        Args:
            name: the person's. If they have an account, it sets a new password, and the role. If it is empty, the
                holder chooses a name.
            by: an admin of the project; None for the operator of the server.

        Raises:
            InputError: unknown project or role, or a name that nobody can have.
        """
        check_role(role)
        name = checked_name(name) if name else ""
        token = new_token()
        with self.store.transaction() as db:
            check_project(db, project)
            check_not_erased(db, project)
            self._delete_expired(db)
            maker = user_named(db, by.name) if by else None
            row = {
                "digest": digest(token),
                "project": project,
                "role": role,
                "name": name,
                "made_by": "" if maker is None else maker.id,
                "expires_at": self.clock() + lasts_s,
            }
            db.execute(insert(invitations), row)
        return token

    def first_admin(self, project: str) -> str | None:
        """Return an invitation for the project's first admin, which replaces any before it; None if there is one."""
        with self.store.transaction() as db:
            self._delete_expired(db)
            if number_of_admins(db, project):
                return None
            open_to_all = (invitations.c.role == "admin", invitations.c.name == "")
            db.execute(delete(invitations).where(invitations.c.project == project, *open_to_all))
            return self.invite(project, "admin", lasts_s=86400)

    def invited(self, token: str) -> Invitation | None:
        """Return what an invitation is for; None if it is over or was used."""
        valid = (invitations.c.digest == digest(token), invitations.c.expires_at > self.clock())
        with self.store.reading() as db:
            row = db.execute(select(invitations).where(*valid)).first()
            if row is None:
                return None
            user = user_named(db, row.name)
            theirs = {} if user is None else roles_of(db, user.id)
            managed = roles_of(db, row.made_by) if row.made_by else dict.fromkeys(theirs, "admin")
        resets = all(managed.get(project) == "admin" for project in theirs)
        return Invitation(row.project, row.role, row.name, resets, user is not None)

    def pending(self, project: str) -> list[Pending]:
        """Return the invitations to a project that can still be accepted, the newest last."""
        maker = users.c.name.label("maker")
        found = select(invitations, maker).outerjoin(users, users.c.id == invitations.c.made_by)
        valid = found.where(invitations.c.project == project, invitations.c.expires_at > self.clock())
        with self.store.reading() as db:
            rows = db.execute(valid.order_by(invitations.c.expires_at, invitations.c.digest)).all()
        return [Pending(row.digest[:ID_LENGTH], row.role, row.name, row.maker or "", row.expires_at) for row in rows]

    def revoke(self, project: str, id: str) -> None:
        """End an invitation. Raises: InputError: the project has none of that id (any more)."""
        this = (invitations.c.project == project, invitations.c.digest.startswith(id, autoescape=True))
        with self.store.transaction() as db:
            if len(id) != ID_LENGTH or db.execute(delete(invitations).where(*this)).rowcount == 0:
                raise InputError("link", id, "it was used, or has ended", "Look at the list again.")

    def accept(self, token: str, name: str, password: str) -> str:
        """Make the account, or set its new password (which ends its sessions), give the role, and open a session.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else; or somebody has the name.
            InputError: a name or password that nobody can have.
        """
        if self.invited(token) is None:  # before a password is hashed for a stranger
            raise refused_invitation()
        name = checked_name(name)
        kept = self.passwords.hashed(checked_password(name, password))
        with self.store.transaction() as db:
            invitation = self._use(db, token)
            user = user_named(db, name)
            check_may_accept(db, invitation, name, user)
            if user is None:
                id = secrets.token_hex(16)
                row = {"id": id, "name": name, "password": kept, "created_at": self.clock()}
                db.execute(insert(users), row)
            else:
                id = user.id
                db.execute(update(users).where(users.c.id == id).values(password=kept))
                db.execute(delete(sessions).where(sessions.c.user == id))
            db.execute(delete(invitations).where(invitations.c.name == name))
            promote(db, invitation.project, id, invitation.role)
            return self._open_session(db, id)

    def join(self, token: str, person: Person) -> None:
        """Give the role of an invitation to a person who has an account.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else.
        """
        with self.store.transaction() as db:
            invitation = self._use(db, token)
            user = user_named(db, person.name)
            if user is None or invitation.name not in ("", person.name):
                raise Refused("token", "(not shown)", "the invitation is for somebody else", "Ask for one of your own.")
            promote(db, invitation.project, user.id, invitation.role)

    def _use(self, db: Connection, token: str) -> Invitation:
        """Return what an invitation is for, and end it. Raises: Refused: it is over or was used."""
        invitation = self.invited(token)
        if invitation is None:
            raise refused_invitation()
        db.execute(delete(invitations).where(invitations.c.digest == digest(token)))
        return invitation

    def _delete_expired(self, db: Connection) -> None:
        db.execute(delete(invitations).where(invitations.c.expires_at < self.clock()))

    # Members

    def members(self, project: str) -> dict[str, str]:
        """Return names and roles of a project, by name."""
        found = select(users.c.name, members.c.role).join(members, members.c.user == users.c.id)
        with self.store.reading() as db:
            rows = db.execute(found.where(members.c.project == project).order_by(users.c.name)).all()
        return {row.name: row.role for row in rows}

    def pseudonym(self, project: str, name: str) -> str:
        """Return the pseudonym of a person who has judged in a project, or is a member of it or invited to it by name.
        A person who has not judged yet gets one.

        Raises:
            InputError: nobody of that name is known there.
        """
        tidied = normalised_name(name)
        with self.store.transaction() as db:
            person = annotator_of(db, project, name) or annotator_of(db, project, tidied)
            if person is None:
                user = user_named(db, tidied)
                invited = select(invitations.c.digest)
                invited = invited.where(invitations.c.project == project, invitations.c.name == tidied)
                member = user is not None and project in roles_of(db, user.id)
                if member or db.execute(invited).first() is not None:
                    person = ensure_annotator(db, project, tidied)
            if person is None:
                check_project(db, project)
                raise unknown_annotator(project, name)
        return person.pseudonym

    def handle(self, project: str, name: str) -> str:
        """Return what stands for a person where no name may: their pseudonym in a project, or else their account's id.

        Raises:
            InputError: nobody of that name has judged in the project or has an account.
        """
        tidied = normalised_name(name)
        with self.store.reading() as db:
            person = annotator_of(db, project, name) or annotator_of(db, project, tidied)
            user = user_named(db, tidied)
        if person is not None:
            return person.pseudonym
        if user is None:
            remedy = "Leave the name out: whoever opens the link chooses one."
            raise InputError("annotator", name, "nobody of that name has an account", remedy)
        return user.id

    def behind(self, project: str, handle: str) -> str:
        """Return the name behind a handle. Raises: InputError: nobody's."""
        theirs = (annotators.c.project == project, annotators.c.pseudonym == handle)
        with self.store.reading() as db:
            name = db.execute(select(annotators.c.identity).where(*theirs)).scalar()
            name = name or db.execute(select(users.c.name).where(users.c.id == handle)).scalar()
        if name is None:
            raise InputError("annotator", handle, "it stands for nobody (any more)", "Give the name.")
        return name

    def set_role(self, project: str, name: str, role: str | None) -> None:
        """Change a person's role in a project; None takes them out of it, and returns the items that they hold.

        Raises:
            InputError: unknown role or member, or the project would be left without an admin.
        """
        if role is not None:
            check_role(role)
        with self.store.transaction() as db:
            user = user_named(db, normalised_name(name))
            before = None if user is None else roles_of(db, user.id).get(project)
            if user is None or before is None:
                raise InputError("name", name, f"nobody of that name is in project {project}", "Check the spelling.")
            last = before == "admin" and role != "admin" and number_of_admins(db, project) == 1
            require(not last, "name", name, "they are the only admin", "Make somebody else one first.")
            if role is None:
                person = annotator_of(db, project, user.name)
                if person is not None:
                    close_leases(db, project, leases.c.annotator == person.pseudonym, "returned")
                remove_member(db, project, user.name)
                self.store.erased()
                return
            if role != "admin":
                theirs = (invitations.c.project == project, invitations.c.made_by == user.id)
                db.execute(delete(invitations).where(*theirs))
            assign_role(db, project, user.id, role)


def check_role(role: str) -> None:
    require(role in ROLES, "role", role, "there is no such role", f"Choose one of: {', '.join(ROLES)}.")


def roles_of(db: Connection, user: str) -> dict[str, str]:
    """Return a user's role by project."""
    mine = select(members.c.project, members.c.role).where(members.c.user == user).order_by(members.c.project)
    return {row.project: row.role for row in db.execute(mine)}


def number_of_admins(db: Connection, project: str) -> int:
    admins = (members.c.project == project, members.c.role == "admin")
    return db.execute(select(func.count()).select_from(members).where(*admins)).scalar_one()


def set_password(db: Connection, user: Row, kept: str) -> None:
    """Set the hash of a user's password, which they proved to know a moment ago.

    Raises:
        Refused: the password has been set anew since, or the account is gone.
    """
    still = (users.c.id == user.id, users.c.password == user.password)
    if db.execute(update(users).where(*still).values(password=kept)).rowcount == 0:
        raise Refused("name", user.name, "the password was set anew meanwhile", "Log in with the new one.")


def check_may_accept(db: Connection, invitation: Invitation, name: str, user: Row | None) -> None:
    """Raise Refused if a person of this name may not take the invitation with a password."""
    if invitation.name:
        if invitation.name != name:
            raise Refused("name", name, f"the invitation is for {invitation.name}", "Ask for one of your own.")
        if not invitation.resets:
            remedy = "Log in and open the link again; who runs the server can set a new password."
            raise Refused("name", name, "the account is in projects of others too", remedy)
        return
    judged = select(annotators.c.pseudonym).where(func.lower(annotators.c.identity) == name).limit(1)
    if user is not None or db.execute(judged).first() is not None:  # with an account or without, in any project
        remedy = "Choose another; if it is yours, log in and open the link again, or ask for one by this name."
        raise Refused("name", name, "somebody here has that name", remedy)


def refused_invitation() -> Refused:
    """Return the error of an invitation that cannot be accepted any more."""
    return Refused("token", "(not shown)", "the invitation is over or was used", "Ask for a new one.")


def assign_role(db: Connection, project: str, user: str, role: str) -> None:
    """Give a user this role, in place of another."""
    db.execute(delete(members).where(members.c.project == project, members.c.user == user))
    db.execute(insert(members), {"project": project, "user": user, "role": role})


def promote(db: Connection, project: str, user: str, role: str) -> None:
    """Give a user this role, unless they have a higher one."""
    before = roles_of(db, user).get(project)
    if before is None or ROLES.index(before) < ROLES.index(role):
        assign_role(db, project, user, role)
