"""Accounts, sessions, invitations and roles. Each request is one transaction.

    accounts = Accounts(store)
    token = accounts.invite("greetings", "annotator")       # usable once, as a link
    session = accounts.accept(token, "ann", "correct horse battery")
    accounts.authenticate_session(session)                  # Person("ann", {"greetings": "annotator"})

Accounts are created, and forgotten passwords replaced, by invitation, so that people always choose their own password.
Passwords are stored as argon2id hashes (RFC 9106), sessions and invitations as the SHA-256 of their random tokens, so
that a reader of the store cannot use them. An admin revokes an invitation by its id, the first digits of its digest.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from argon2 import PasswordHasher
from sqlalchemy import Connection, Row, delete, func, insert, select, update

from align.annotate.store import Store
from align.annotate.store.database import build_unknown_annotator_error
from align.annotate.store.erasure import find_user, remove_member
from align.annotate.store.ledger import close_leases, ensure_annotator, find_annotator, require_known_project
from align.annotate.store.projects import require_not_erased
from align.annotate.store.tables import annotators, invitations, leases, members, sessions, users
from align.core.errors import InputError, require
from align.core.names import normalise_name
from align.web.credentials import (
    AccessRefused,
    Passwords,
    create_token,
    get_network,
    hash_token,
    is_valid_name,
    validate_name,
    validate_password,
)
from align.web.throttle import Throttle

ROLES = ("annotator", "reviewer", "admin")
"""Roles in a project, the lowest first.

An annotator judges; a reviewer also sees everyone's figures and decides disagreements; an admin also manages.
"""
SESSION_S = 14 * 86400
"""Seconds without a request after which a session ends."""
PROLONGED_EVERY_S = 3600
"""Seconds between writes that prolong a session, so that not every request writes."""
INVITATION_S = 7 * 86400
"""Seconds until an invitation expires."""
ID_LENGTH = 12
"""Number of hex digits at the start of an invitation's digest that serve as its id."""
FREE_ATTEMPTS = 5
"""Number of wrong passwords for a name from one network before each further attempt must wait."""
FREE_ATTEMPTS_IN_ALL = 50
"""Number of wrong passwords for a name from all networks, or from a network for all names, before attempts wait."""


@dataclass(frozen=True, slots=True)
class Person:
    """A logged-in person, with their role in each project.

    Attributes:
        name: also the identity of their annotator.
        roles: role by project.
    """

    name: str
    roles: Mapping[str, str]

    def has_role(self, project: str, role: str) -> bool:
        """Return whether the person's role in a project is `role` or a higher one, in the order of `ROLES`."""
        own_role = self.roles.get(project)
        return own_role is not None and ROLES.index(own_role) >= ROLES.index(role)


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invitation to join a project in a role, as it is shown to its holder.

    Attributes:
        name: the invited person's; empty if its holder chooses one.
        resets: whether it may set the password of that name: there is no such account, or the invitation's author is an
            admin of all projects of the account. Otherwise the person must log in to accept it.
        has_account: whether there is an account of that name.
    """

    project: str
    role: str
    name: str
    resets: bool
    has_account: bool


@dataclass(frozen=True, slots=True)
class PendingInvitation:
    """An invitation that can still be accepted, as it is listed for admins.

    Attributes:
        name: the invited person's; empty if its holder chooses one.
        made_by: name of the admin; empty for the operator of the server.
        expires_at: seconds since 1970.
    """

    id: str
    role: str
    name: str
    made_by: str
    expires_at: float


class Accounts:
    """The accounts, sessions, invitations and members of an annotation store. Safe to share between threads.

    Args:
        clock: returns seconds since 1970.
        hasher: hashes passwords; the default takes 64 MiB and about 0.1 s per password.
    """

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.time, hasher: PasswordHasher | None = None
    ) -> None:
        self.store = store
        self.clock = clock
        self.passwords = Passwords(hasher or PasswordHasher())
        self._throttle = Throttle(time.monotonic)

    # Sessions and passwords

    def log_in(self, name: str, password: str, address: str) -> str:
        """Verify a name and password, open a session, and return its token.

        Args:
            address: IP address of the attempt. Failures of a name and of an address both make the next attempt wait.

        Raises:
            AccessRefused: no such name and password, or too many attempts.
            ServerBusy: too many passwords are being checked.
        """
        user = self._verify_password(name, password, address)
        is_stale = self.passwords.needs_rehash(user.password)
        password_hash = self.passwords.hash_password(password) if is_stale else user.password
        with self.store.transaction() as db:
            set_password(db, user, password_hash)
            return self._open_session(db, user.id)

    def authenticate_session(self, session: str) -> Person | None:
        """Return the logged-in person of a session token and extend the session, or return None if it has ended."""
        now = self.clock()
        query = select(users.c.id, users.c.name, sessions.c.expires_at).join(users, users.c.id == sessions.c.user)
        same_session = sessions.c.digest == hash_token(session)
        with self.store.reading() as db:
            user = db.execute(query.where(same_session, sessions.c.expires_at > now)).first()
            if user is None:
                return None
            person = Person(user.name, read_roles(db, user.id))
        if user.expires_at < now + SESSION_S - PROLONGED_EVERY_S:
            with self.store.transaction() as db:
                db.execute(update(sessions).where(same_session).values(expires_at=now + SESSION_S))
        return person

    def log_out(self, session: str) -> None:
        """Delete the session of a token."""
        with self.store.transaction() as db:
            db.execute(delete(sessions).where(sessions.c.digest == hash_token(session)))

    def change_password(self, session: str, old_password: str, new_password: str) -> None:
        """Replace a logged-in person's password, end their other sessions, and delete the invitations for their name.

        Raises:
            AccessRefused: the session has ended, the old password is wrong, or too many attempts.
            InputError: the new password is too short or too long.
        """
        person = self.authenticate_session(session)
        if person is None:
            raise AccessRefused("session", "(not shown)", "it has ended", "Log in again.")
        user = self._verify_password(person.name, old_password, f"session of {person.name}")
        password_hash = self.passwords.hash_password(validate_password(person.name, new_password))
        with self.store.transaction() as db:
            set_password(db, user, password_hash)
            db.execute(delete(invitations).where(invitations.c.name == person.name))
            db.execute(delete(sessions).where(sessions.c.user == user.id, sessions.c.digest != hash_token(session)))

    def _verify_password(self, name: str, password: str, address: str) -> Row[Any]:
        """Return the database row of the user with a name and password, or raise AccessRefused and count the failure.

        Raises also as `log_in`. An attempt that could not be verified does not count as a failure.
        """
        name = normalise_name(name)
        client_network = get_network(address)
        name_and_network = f"name {name[:100]} from {client_network}"
        limits = (
            (name_and_network, FREE_ATTEMPTS),
            (f"name {name[:100]}", FREE_ATTEMPTS_IN_ALL),
            (f"from {client_network}", FREE_ATTEMPTS_IN_ALL),
        )
        failures = self._throttle.count_failures(f"from {client_network}")
        with ExitStack() as unverified:
            for throttle_key, free_attempts in limits:
                wait = self._throttle.begin_attempt(throttle_key, free_attempts)
                if wait > 0:
                    problem = f"too many attempts; the next counts in {math.ceil(wait)} s"
                    raise AccessRefused("name", name, problem, "Wait, then try again.")
                unverified.callback(self._throttle.cancel_attempt, throttle_key)
            user = None
            if is_valid_name(name):  # spares the database impossible names
                with self.store.reading() as db:
                    user = find_user(db, name)
            matches = self.passwords.matches(
                None if user is None else user.password, password, client_network, failures
            )
            unverified.pop_all()
        if user is None or not matches:
            raise AccessRefused("name", name, "no such name and password", "Check both; an admin can send a new link.")
        self._throttle.record_success(name_and_network)
        for throttle_key, _ in limits[1:]:
            self._throttle.cancel_attempt(throttle_key)
        return user

    def _open_session(self, db: Connection, user_id: str) -> str:
        """Open a session of a user and return its token. Deletes the expired sessions of all users."""
        token = create_token()
        now = self.clock()
        db.execute(delete(sessions).where(sessions.c.expires_at < now))
        db.execute(insert(sessions), {"digest": hash_token(token), "user": user_id, "expires_at": now + SESSION_S})
        return token

    # Invitations

    def invite(
        self, project: str, role: str, name: str = "", lifetime_s: float = INVITATION_S, inviter: Person | None = None
    ) -> str:
        """Create an invitation by which one person can join a project in a role, and return its token.

        Args:
            name: the invited person's. An existing account gets a new password and the role. If it is empty, the holder
                chooses a name.
            lifetime_s: seconds until it expires.
            inviter: an admin of the project; None for the operator of the server.

        Raises:
            InputError: unknown project or role, or an invalid name.
        """
        require_known_role(role)
        name = validate_name(name) if name else ""
        token = create_token()
        with self.store.transaction() as db:
            require_known_project(db, project)
            require_not_erased(db, project)
            self._delete_expired_invitations(db)
            author = find_user(db, inviter.name) if inviter else None
            row = {
                "digest": hash_token(token),
                "project": project,
                "role": role,
                "name": name,
                "made_by": "" if author is None else author.id,
                "expires_at": self.clock() + lifetime_s,
            }
            db.execute(insert(invitations), row)
        return token

    def invite_first_admin(self, project: str) -> str | None:
        """Create an invitation for a project's first admin and return its token, or None if the project has an admin.

        It lasts a day. Earlier invitations of this kind are deleted.
        """
        with self.store.transaction() as db:
            self._delete_expired_invitations(db)
            if count_admins(db, project):
                return None
            unnamed_admin = (invitations.c.role == "admin", invitations.c.name == "")
            db.execute(delete(invitations).where(invitations.c.project == project, *unnamed_admin))
            return self.invite(project, "admin", lifetime_s=86400)

    def find_invitation(self, token: str) -> Invitation | None:
        """Return the invitation that a token belongs to, or None if it has expired or was used."""
        conditions = (invitations.c.digest == hash_token(token), invitations.c.expires_at > self.clock())
        with self.store.reading() as db:
            row = db.execute(select(invitations).where(*conditions)).first()
            if row is None:
                return None
            user = find_user(db, row.name)
            roles = {} if user is None else read_roles(db, user.id)
            author_roles = read_roles(db, row.made_by) if row.made_by else dict.fromkeys(roles, "admin")
        resets = all(author_roles.get(project) == "admin" for project in roles)
        return Invitation(row.project, row.role, row.name, resets, user is not None)

    def list_invitations(self, project: str) -> list[PendingInvitation]:
        """Return the invitations to a project that can still be accepted, ordered by the time when they expire."""
        author_name = users.c.name.label("author_name")
        query = select(invitations, author_name).outerjoin(users, users.c.id == invitations.c.made_by)
        pending = query.where(invitations.c.project == project, invitations.c.expires_at > self.clock())
        with self.store.reading() as db:
            rows = db.execute(pending.order_by(invitations.c.expires_at, invitations.c.digest)).all()
        return [
            PendingInvitation(row.digest[:ID_LENGTH], row.role, row.name, row.author_name or "", row.expires_at)
            for row in rows
        ]

    def revoke(self, project: str, id: str) -> None:
        """Delete a pending invitation to a project, by its id.

        Raises:
            InputError: the project has no invitation of this id, or it was used or has ended.
        """
        conditions = (invitations.c.project == project, invitations.c.digest.startswith(id, autoescape=True))
        with self.store.transaction() as db:
            if len(id) != ID_LENGTH or db.execute(delete(invitations).where(*conditions)).rowcount == 0:
                raise InputError("link", id, "it was used, or has ended", "Load the list of invitations again.")

    def accept(self, token: str, name: str, password: str) -> str:
        """Accept an invitation with a name and password, log the person in, and return the token of the new session.

        It creates the account, or sets its new password and ends its sessions, assigns the role, and deletes the
        invitation.

        Raises:
            AccessRefused: the invitation has expired, was used or is for another person, or the name is taken.
            InputError: an invalid name or password.
        """
        if self.find_invitation(token) is None:  # checked first, because hashing a password is slow
            raise build_invalid_invitation_error()
        name = validate_name(name)
        password_hash = self.passwords.hash_password(validate_password(name, password))
        with self.store.transaction() as db:
            invitation = self._redeem_invitation(db, token)
            user = find_user(db, name)
            require_name_allowed(db, invitation, name, user)
            if user is None:
                id = secrets.token_hex(16)
                row = {"id": id, "name": name, "password": password_hash, "created_at": self.clock()}
                db.execute(insert(users), row)
            else:
                id = user.id
                db.execute(update(users).where(users.c.id == id).values(password=password_hash))
                db.execute(delete(sessions).where(sessions.c.user == id))
            db.execute(delete(invitations).where(invitations.c.name == name))
            assign_role_unless_higher(db, invitation.project, id, invitation.role)
            return self._open_session(db, id)

    def join(self, token: str, person: Person) -> None:
        """Accept an invitation for a logged-in person: assign them its role, unless theirs is higher, and delete it.

        Raises:
            AccessRefused: the invitation has expired, was used or is for another person.
        """
        with self.store.transaction() as db:
            invitation = self._redeem_invitation(db, token)
            user = find_user(db, person.name)
            if user is None or invitation.name not in ("", person.name):
                raise AccessRefused(
                    "token", "(not shown)", "the invitation is for another person", "Ask for one of your own."
                )
            assign_role_unless_higher(db, invitation.project, user.id, invitation.role)

    def _redeem_invitation(self, db: Connection, token: str) -> Invitation:
        """Delete the invitation of a token and return it, or raise AccessRefused if it has expired or was used."""
        invitation = self.find_invitation(token)
        if invitation is None:
            raise build_invalid_invitation_error()
        db.execute(delete(invitations).where(invitations.c.digest == hash_token(token)))
        return invitation

    def _delete_expired_invitations(self, db: Connection) -> None:
        db.execute(delete(invitations).where(invitations.c.expires_at < self.clock()))

    # Members

    def list_members(self, project: str) -> dict[str, str]:
        """Return the members of a project: name → role, sorted by name."""
        query = select(users.c.name, members.c.role).join(members, members.c.user == users.c.id)
        with self.store.reading() as db:
            rows = db.execute(query.where(members.c.project == project).order_by(users.c.name)).all()
        return {row.name: row.role for row in rows}

    def ensure_pseudonym(self, project: str, name: str) -> str:
        """Return a person's pseudonym in a project, and create it if they are a member or invited and have none yet.

        Raises:
            InputError: the name is neither an annotator of the project, nor a member, nor invited.
        """
        normalised = normalise_name(name)
        with self.store.transaction() as db:
            annotator = find_annotator(db, project, name) or find_annotator(db, project, normalised)
            if annotator is None:
                user = find_user(db, normalised)
                own_invitations = select(invitations.c.digest)
                own_invitations = own_invitations.where(
                    invitations.c.project == project, invitations.c.name == normalised
                )
                is_member = user is not None and project in read_roles(db, user.id)
                if is_member or db.execute(own_invitations).first() is not None:
                    annotator = ensure_annotator(db, project, normalised)
            if annotator is None:
                require_known_project(db, project)
                raise build_unknown_annotator_error(project, name)
        return annotator.pseudonym

    def get_handle(self, project: str, name: str) -> str:
        """Return an identifier of a person without their name: their pseudonym in a project, or else their account id.

        Raises:
            InputError: the name is neither an annotator of the project nor an account.
        """
        normalised = normalise_name(name)
        with self.store.reading() as db:
            annotator = find_annotator(db, project, name) or find_annotator(db, project, normalised)
            user = find_user(db, normalised)
        if annotator is not None:
            return annotator.pseudonym
        if user is None:
            remedy = "Leave the name out: the person who opens the link chooses one."
            raise InputError("annotator", name, "there is no account of that name", remedy)
        return user.id

    def resolve_handle(self, project: str, handle: str) -> str:
        """Return the name of the person whose pseudonym in a project, or whose account id, is `handle`.

        Raises:
            InputError: no such handle.
        """
        conditions = (annotators.c.project == project, annotators.c.pseudonym == handle)
        with self.store.reading() as db:
            name = db.execute(select(annotators.c.identity).where(*conditions)).scalar()
            name = name or db.execute(select(users.c.name).where(users.c.id == handle)).scalar()
        if name is None:
            raise InputError("annotator", handle, "no person has this pseudonym or id (any more)", "Give the name.")
        return name

    def set_role(self, project: str, name: str, role: str | None) -> None:
        """Change a person's role in a project, or remove them from the project if `role` is `None`.

        If they are removed, the items that they hold go back to the queue.

        Raises:
            InputError: unknown role or member, or the project would lose its only admin.
        """
        if role is not None:
            require_known_role(role)
        with self.store.transaction() as db:
            user = find_user(db, normalise_name(name))
            current_role = None if user is None else read_roles(db, user.id).get(project)
            if user is None or current_role is None:
                raise InputError(
                    "name", name, f"there is no member of that name in project {project}", "Check the spelling."
                )
            is_last_admin = current_role == "admin" and role != "admin" and count_admins(db, project) == 1
            require(not is_last_admin, "name", name, "they are the only admin", "Make another member an admin first.")
            if role is None:
                annotator = find_annotator(db, project, user.name)
                if annotator is not None:
                    close_leases(db, project, leases.c.annotator == annotator.pseudonym, "returned")
                remove_member(db, project, user.name)
                self.store.note_erasure()
                return
            if role != "admin":
                own_invitations = (invitations.c.project == project, invitations.c.made_by == user.id)
                db.execute(delete(invitations).where(*own_invitations))
            assign_role(db, project, user.id, role)


def require_known_role(role: str) -> None:
    require(role in ROLES, "role", role, "there is no such role", f"Choose one of: {', '.join(ROLES)}.")


def read_roles(db: Connection, user: str) -> dict[str, str]:
    """Return a user's roles: project → `annotator`, `reviewer` or `admin`."""
    query = select(members.c.project, members.c.role).where(members.c.user == user).order_by(members.c.project)
    return {row.project: row.role for row in db.execute(query)}


def count_admins(db: Connection, project: str) -> int:
    admins = (members.c.project == project, members.c.role == "admin")
    return db.execute(select(func.count()).select_from(members).where(*admins)).scalar_one()


def set_password(db: Connection, user: Row[Any], password_hash: str) -> None:
    """Replace the hash of a user's password, or raise AccessRefused if it changed since the row `user` was read.

    Raises:
        AccessRefused: the password was changed in between, or the account is gone.
    """
    unchanged = (users.c.id == user.id, users.c.password == user.password)
    if db.execute(update(users).where(*unchanged).values(password=password_hash)).rowcount == 0:
        raise AccessRefused("name", user.name, "the password was changed in the meantime", "Log in with the new one.")


def require_name_allowed(db: Connection, invitation: Invitation, name: str, user: Row[Any] | None) -> None:
    """Raise AccessRefused if an invitation does not let a person create the account `name` or reset its password.

    Args:
        user: the row of the account of that name, if there is one.
    """
    if invitation.name:
        if invitation.name != name:
            raise AccessRefused("name", name, f"the invitation is for {invitation.name}", "Ask for one of your own.")
        if not invitation.resets:
            remedy = "Log in and open the link again; the operator of the server can set a new password."
            raise AccessRefused("name", name, "the account is also in projects of other admins", remedy)
        return
    annotator_of_name = select(annotators.c.pseudonym).where(func.lower(annotators.c.identity) == name).limit(1)
    # The name is taken by an account, or by an annotator without an account, in any project.
    if user is not None or db.execute(annotator_of_name).first() is not None:
        remedy = "Choose another; if it is yours, log in and open the link again, or ask for one by this name."
        raise AccessRefused("name", name, "the name is taken", remedy)


def build_invalid_invitation_error() -> AccessRefused:
    """Return the error for an invitation token that has expired or was used."""
    return AccessRefused("token", "(not shown)", "the invitation has expired or was used", "Ask for a new one.")


def assign_role(db: Connection, project: str, user: str, role: str) -> None:
    """Set a user's role in a project, in place of the role that they had."""
    db.execute(delete(members).where(members.c.project == project, members.c.user == user))
    db.execute(insert(members), {"project": project, "user": user, "role": role})


def assign_role_unless_higher(db: Connection, project: str, user: str, role: str) -> None:
    """Set a user's role in a project unless they have a higher one."""
    current_role = read_roles(db, user).get(project)
    if current_role is None or ROLES.index(current_role) < ROLES.index(role):
        assign_role(db, project, user, role)
