"""The accounts of a store: each thing that is asked of them is one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable

from argon2 import PasswordHasher

from align.annotate.accounts import invitations, sessions
from align.annotate.accounts.invitations import INVITATION_S, Invitation, Pending
from align.annotate.accounts.members import (
    Person,
    annotator_named,
    assign_role,
    check_role,
    member_named,
    members_of,
    name_of_handle,
    new_expected_annotator,
    promote,
    remove_member,
)
from align.annotate.accounts.passwords import new_user, replace_password, set_password, verified_user
from align.annotate.store import Store
from align.annotate.store.projects import check_not_erased
from align.annotate.store.queries import check_project
from align.annotate.store.users import number_of_admins, roles_of, user_named
from align.errors import InputError
from align.web.credentials import Passwords, Refused, checked_name, checked_password, normalised_name
from align.web.throttle import Throttle


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
        user = verified_user(self.store, self.passwords, self._tries, name, password, address)
        stale = self.passwords.stale(user.password)
        kept = self.passwords.hashed(password) if stale else user.password
        with self.store.transaction() as db:
            set_password(db, user, kept)
            return sessions.open_session(db, user.id, self.clock())

    def who(self, session: str) -> Person | None:
        """Whose session it is; None where it is none (any more). Coming back keeps it open."""
        now = self.clock()
        with self.store.reading() as db:
            user = sessions.user_of(db, session, now)
            if user is None:
                return None
            person = Person(user.name, roles_of(db, user.id))
        if sessions.is_due(user.expires_at, now):
            with self.store.transaction() as db:
                sessions.prolong(db, session, now)
        return person

    def log_out(self, session: str) -> None:
        with self.store.transaction() as db:
            sessions.end(db, session)

    def change_password(self, session: str, old: str, new: str) -> None:
        """Sets another password, and ends the person's other sessions.

        Raises:
            Refused: the old one is not theirs, or too many attempts.
            InputError: the new one is too short or too long.
        """
        person = self.who(session)
        if person is None:
            raise Refused("session", "(not shown)", "it is over", "Log in again.")
        user = verified_user(self.store, self.passwords, self._tries, person.name, old, f"session of {person.name}")
        kept = self.passwords.hashed(checked_password(person.name, new))
        with self.store.transaction() as db:
            set_password(db, user, kept)
            invitations.end_for(db, person.name)
            sessions.end_all(db, user.id, but=session)

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
        check_role(role)
        name = checked_name(name) if name else ""
        with self.store.transaction() as db:
            check_project(db, project)
            check_not_erased(db, project)
            return invitations.add(db, project, role, name, by.name if by else "", self.clock(), lasts_s)

    def first_admin(self, project: str) -> str | None:
        """An invitation for the project's first admin, which replaces any before it; None where there is one."""
        with self.store.transaction() as db:
            invitations.end_expired(db, self.clock())
            if number_of_admins(db, project):
                return None
            invitations.end_of_admins(db, project)
            return self.invite(project, "admin", lasts_s=86400)

    def invited(self, token: str) -> Invitation | None:
        """What an invitation is for; None where it is none (any more)."""
        with self.store.reading() as db:
            return invitations.invitation_of(db, token, self.clock())

    def pending(self, project: str) -> list[Pending]:
        """The invitations to a project that are good still, the newest last."""
        with self.store.reading() as db:
            return invitations.pending(db, project, self.clock())

    def revoke(self, project: str, id: str) -> None:
        """Ends an invitation. Raises: InputError: the project has none of that id (any more)."""
        with self.store.transaction() as db:
            invitations.revoke(db, project, id)

    def accept(self, token: str, name: str, password: str) -> str:
        """Makes the account, or sets its new password (which ends its sessions), gives the role, and opens a session.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else; or somebody has the name.
            InputError: a name or password that nobody can have.
        """
        if self.invited(token) is None:  # before a password is hashed for whoever comes by
            raise invitations.over()
        name = checked_name(name)
        kept = self.passwords.hashed(checked_password(name, password))
        with self.store.transaction() as db:
            invitation = invitations.used(db, token, self.clock())
            user = user_named(db, name)
            invitations.check_may_accept(db, invitation, name, user)
            if user is None:
                id = new_user(db, name, kept, self.clock())
            else:
                id = user.id
                replace_password(db, id, kept)
                sessions.end_all(db, id)
            invitations.end_for(db, name)
            promote(db, invitation.project, id, invitation.role)
            return sessions.open_session(db, id, self.clock())

    def join(self, token: str, person: Person) -> None:
        """Gives somebody who has an account the role of an invitation.

        Raises:
            Refused: the invitation is over, was used, or is for somebody else.
        """
        with self.store.transaction() as db:
            invitation, user = invitations.used(db, token, self.clock()), user_named(db, person.name)
            if user is None or invitation.name not in ("", person.name):
                raise Refused("token", "(not shown)", "the invitation is for somebody else", "Ask for one of your own.")
            promote(db, invitation.project, user.id, invitation.role)

    # Members

    def members(self, project: str) -> dict[str, str]:
        """Names and roles of a project, by name."""
        with self.store.reading() as db:
            return members_of(db, project)

    def pseudonym(self, project: str, name: str) -> str:
        """Of somebody who has judged in a project, or is a member of it or invited to it by name: who was not met yet
        gets one.

        Raises:
            InputError: nobody of that name is known there.
        """
        with self.store.transaction() as db:
            person = annotator_named(db, project, name) or new_expected_annotator(db, project, name)
        return self.store.known(project, name) if person is None else person.pseudonym

    def handle(self, project: str, name: str) -> str:
        """What stands for somebody where no name may: their pseudonym in a project, or else their account's id.

        Raises:
            InputError: nobody of that name has judged in the project or has an account.
        """
        with self.store.reading() as db:
            person = annotator_named(db, project, name)
            user = user_named(db, normalised_name(name))
        if person is not None:
            return person.pseudonym
        if user is None:
            remedy = "Leave the name out: whoever opens the link chooses one."
            raise InputError("annotator", name, "nobody of that name has an account", remedy)
        return user.id

    def behind(self, project: str, handle: str) -> str:
        """The name behind a handle. Raises: InputError: nobody's."""
        with self.store.reading() as db:
            found = name_of_handle(db, project, handle)
        if found is None:
            raise InputError("annotator", handle, "it stands for nobody (any more)", "Give the name.")
        return found

    def set_role(self, project: str, name: str, role: str | None) -> None:
        """Changes somebody's role in a project; None takes them out of it, and what they hold goes back.

        Raises:
            InputError: unknown role or member, or the project would be left without an admin.
        """
        if role is not None:
            check_role(role)
        with self.store.transaction() as db:
            user = member_named(db, project, name, role)
            if role is None:
                remove_member(db, project, user)
                self.store.erased()
                return
            if role != "admin":
                invitations.end_of_maker(db, project, user.id)
            assign_role(db, project, user.id, role)
