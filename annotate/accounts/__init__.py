"""Accounts: who may come in, and what they may do in which project.

    accounts = Accounts(store)
    token = accounts.invite("greetings", "annotator")       # a link, once
    session = accounts.accept(token, "ann", "correct horse battery")
    accounts.who(session)                                   # Person("ann", {"greetings": "annotator"})

Nobody has a password that they did not choose: an account begins, and a password is set anew, by an invitation.
Passwords are kept as argon2id hashes (RFC 9106), sessions and invitations as SHA-256 of their random tokens.
"""

from align.annotate.accounts.accounts import (
    INVITATION_S,
    ROLES,
    SESSION_S,
    TRIES,
    TRIES_MANY,
    Accounts,
    Invitation,
    Person,
)

__all__ = ["INVITATION_S", "ROLES", "SESSION_S", "TRIES", "TRIES_MANY", "Accounts", "Invitation", "Person"]
