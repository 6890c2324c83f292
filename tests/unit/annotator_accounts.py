"""A fixed clock, a good password, and a member who accepted an invitation, for tests of accounts."""

from __future__ import annotations

from dataclasses import dataclass

from align.annotate.accounts import Accounts

GOOD = "correct horse battery"


@dataclass
class Time:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def accept_invitation(accounts: Accounts, name: str, role: str = "annotator", project: str = "p") -> str:
    return accounts.accept(accounts.invite(project, role), name, GOOD)
