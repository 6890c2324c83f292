"""Accounts: who may come in, and what they may do in which project.

    accounts = Accounts(store)
    token = accounts.invite("greetings", "annotator")       # a link, once
    session = accounts.accept(token, "ann", "correct horse battery")
    accounts.who(session)                                   # Person("ann", {"greetings": "annotator"})

Nobody has a password that they did not choose: an account begins, and a password is set anew, by an invitation.
Passwords are kept as argon2id hashes (RFC 9106), sessions and invitations as SHA-256 of their random tokens.

accounts   what is asked of them, a transaction each    sessions     opened, prolonged, ended
members    roles, and what stands for a name            invitations  links that let somebody in
passwords  verified, after a wait; set
"""

from align.annotate.accounts.accounts import Accounts
from align.annotate.accounts.invitations import INVITATION_S, Invitation
from align.annotate.accounts.members import ROLES, Person
from align.annotate.accounts.passwords import TRIES, TRIES_MANY
from align.annotate.accounts.sessions import SESSION_S

__all__ = ["INVITATION_S", "ROLES", "SESSION_S", "TRIES", "TRIES_MANY", "Accounts", "Invitation", "Person"]
