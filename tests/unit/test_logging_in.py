"""Logging in: wrong passwords, guesses one by one and at once, and the cost of password hashes."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from annotator_accounts import GOOD, Time, accept_invitation
from argon2 import PasswordHasher
from sqlalchemy import select

from align.annotate.accounts import FREE_ATTEMPTS, FREE_ATTEMPTS_IN_ALL, Accounts
from align.annotate.store.tables import users
from align.web.credentials import AccessRefused
from align.web.throttle import Throttle


@pytest.mark.parametrize(
    ("name", "password"), [("ann", GOOD + "x"), ("ann", ""), ("bob", GOOD), ("", ""), ("ann", "x" * 10**5)]
)
def test_a_wrong_password_and_an_unknown_name_are_told_the_same(accounts, name, password):
    accept_invitation(accounts, "ann")
    with pytest.raises(AccessRefused, match="no such name and password"):
        accounts.log_in(name, password, "here")


def guess_password(accounts: Accounts, name: str, address: str, times: int) -> None:
    for _ in range(times):
        with pytest.raises(AccessRefused, match="no such name"):
            accounts.log_in(name, "wrong password", address)


def test_guessing_is_slowed_and_the_right_password_is_not_looked_at_meanwhile(accounts):
    clock = Time()
    accounts._throttle = Throttle(clock)
    for name in ("ann", "bob"):
        accept_invitation(accounts, name)
    guess_password(accounts, "ann", "there", FREE_ATTEMPTS + 1)
    with pytest.raises(AccessRefused, match="too many attempts; the next counts in 1 s"):
        accounts.log_in("ann", GOOD, "there")
    assert accounts.log_in("ann", GOOD, "elsewhere")  # guesses from another address keep no user out
    assert accounts.log_in("bob", GOOD, "there")
    clock.now += 1
    assert accounts.log_in("ann", GOOD, "there")
    guess_password(accounts, "ann", "there", FREE_ATTEMPTS)  # the login before reset the count


def test_many_guesses_from_everywhere_or_at_everybody_are_slowed_too(accounts):
    clock = Time()
    accounts._throttle = Throttle(clock)
    accept_invitation(accounts, "ann")
    for i in range(FREE_ATTEMPTS_IN_ALL + 1):
        guess_password(accounts, "ann", f"10.0.0.{i}", 1)
    with pytest.raises(AccessRefused, match="too many attempts"):
        accounts.log_in("ann", GOOD, "elsewhere")
    for i in range(FREE_ATTEMPTS_IN_ALL + 1):
        guess_password(accounts, f"name {i}", f"2001:db8::{i:x}", 1)  # all in one customer's network
    with pytest.raises(AccessRefused, match="too many attempts"):
        accounts.log_in("bob", "wrong password", "2001:db8::ffff")


def test_guesses_at_once_are_no_more_than_guesses_in_a_row(accounts, monkeypatch):
    accept_invitation(accounts, "ann")
    checks = []
    barrier = threading.Barrier(30)
    monkeypatch.setattr(accounts.passwords, "matches", lambda *_: checks.append(1))

    def guess_once() -> None:
        barrier.wait()
        with suppress(AccessRefused):
            accounts.log_in("ann", "wrong password", "there")

    threads = [threading.Thread(target=guess_once) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == FREE_ATTEMPTS + 1


def test_waits_double_and_end():
    clock = Time()
    throttle = Throttle(clock, longest=10, names=3)
    waits = []
    for _ in range(8):
        assert throttle.begin_attempt("a", 2) == 0
        waits.append(throttle.begin_attempt("a", 2) if throttle._failures["a"].until > clock.now else 0)
        clock.now += waits[-1]
    assert waits == [0, 0, 1, 2, 4, 8, 10, 10]
    clock.now += 11
    throttle.begin_attempt("a", 2)
    assert throttle.begin_attempt("a", 2) == 0  # the failures are long ago
    for name in "bcd":
        for _ in range(3):
            throttle.begin_attempt(name, 2)
    assert (throttle.begin_attempt("a", 2), throttle.begin_attempt("d", 2)) == (0, 1)  # the oldest was forgotten


def test_strangers_with_no_invitation_hash_nothing(accounts, monkeypatch):
    monkeypatch.setattr(accounts.passwords, "hash_password", lambda _: pytest.fail("a password was hashed"))
    with pytest.raises(AccessRefused, match="expired or was used"):
        accounts.accept("x", "ann", GOOD)


def test_an_unknown_name_costs_what_a_known_one_does(accounts, monkeypatch):
    accept_invitation(accounts, "ann")
    verified = []
    hasher = accounts.passwords.hasher

    class Counting:
        def verify(self, kept: str, password: str) -> bool:
            verified.append(kept)
            return hasher.verify(kept, password)

    monkeypatch.setattr(accounts.passwords, "hasher", Counting())
    for name in ("nobody", "a\x00b", "\u202e", "x" * 200):
        with pytest.raises(AccessRefused, match="no such name"):
            accounts.log_in(name, GOOD, "here")
    assert len(verified) == 4


def test_a_hash_that_cost_less_is_made_anew(store, accounts):
    accept_invitation(accounts, "ann")
    dearer = Accounts(store, hasher=PasswordHasher(time_cost=2, memory_cost=16, parallelism=1))
    assert dearer.log_in("ann", GOOD, "here")
    with store.reading() as db:
        assert "m=16,t=2" in db.execute(select(users.c.password)).scalar_one()
    assert dearer.log_in("ann", GOOD, "here")


def test_a_session_that_the_old_password_would_open_is_none(accounts, monkeypatch):
    accept_invitation(accounts, "ann")
    matches = accounts.passwords.matches

    def match_and_change_password(kept: str | None, password: str, *caller) -> bool:
        is_match = matches(kept, password, *caller)
        monkeypatch.setattr(accounts.passwords, "matches", matches)
        accounts.accept(accounts.invite("p", "annotator", "ann"), "ann", "another good one")
        return is_match

    monkeypatch.setattr(accounts.passwords, "matches", match_and_change_password)
    with pytest.raises(AccessRefused, match="was changed in the meantime"):
        accounts.log_in("ann", GOOD, "here")
