"""Accounts: passwords, sessions, invitations, roles, and what is left of somebody who is erased."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from annotation_store import add
from argon2 import PasswordHasher
from sqlalchemy import select, text

from align.errors import InputError
from annotate.accounts import INVITATION_S, SESSION_S, Accounts, Person, Refused
from annotate.assignment import Desk
from annotate.store import Judgement, Store
from annotate.store.tables import invitations, leases, members, sessions, users
from annotate.throttle import Throttle

GOOD = "correct horse battery"


@dataclass
class Time:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def store(store_url) -> Iterator[Store]:
    with Store.open(store_url) as store:
        for i in range(3):
            add(store, f"run/{i}")
        yield store


@pytest.fixture
def accounts(store, time) -> Accounts:
    return Accounts(store, time, PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


def member(accounts: Accounts, name: str, role: str = "annotator", project: str = "p") -> str:
    return accounts.accept(accounts.invite(project, role), name, GOOD)


def test_nothing_in_the_database_lets_anybody_in(accounts, store):
    token = accounts.invite("p", "annotator")
    session = accounts.accept(token, "ann", GOOD)
    second = accounts.invite("p", "annotator")
    with store.reading() as db:
        kept = str([db.execute(select(table)).all() for table in (users, sessions, invitations, members)])
    assert not any(secret in kept for secret in (token, second, session, GOOD))
    assert "$argon2id$" in kept


def test_the_default_hasher_costs_what_the_rfc_asks(store):
    assert "$argon2id$v=19$m=65536,t=3,p=4$" in Accounts(store).hasher.hash("x")


def test_a_session_is_its_persons_until_it_is_over(accounts, time):
    member(accounts, "ann", "reviewer")
    session = accounts.log_in("ann", GOOD, "here")
    assert accounts.who(session) == Person("ann", {"p": "reviewer"})
    time.now += SESSION_S - 1
    assert accounts.who(session) is not None  # which keeps it open
    time.now += SESSION_S - 1
    assert accounts.who(session) is not None
    time.now += SESSION_S + 1
    assert accounts.who(session) is None
    again = accounts.log_in("ann", GOOD, "here")
    accounts.log_out(again)
    assert accounts.who(again) is None
    assert accounts.who("") is accounts.who("x" * 43) is None


@pytest.mark.parametrize("name", ["ANN", " ann ", "ａｎｎ"])
def test_a_name_is_known_however_it_is_written(accounts, name):
    member(accounts, "Ann")
    assert accounts.who(accounts.log_in(name, GOOD, "here")).name == "ann"
    with pytest.raises(Refused, match="somebody here has that name"):
        member(accounts, name)


@pytest.mark.parametrize(
    ("name", "password"), [("ann", GOOD + "x"), ("ann", ""), ("bob", GOOD), ("", ""), ("ann", "x" * 10**5)]
)
def test_a_wrong_password_and_an_unknown_name_are_told_the_same(accounts, name, password):
    member(accounts, "ann")
    with pytest.raises(Refused, match="no such name and password"):
        accounts.log_in(name, password, "here")


def test_guessing_is_slowed_and_the_right_password_is_not_looked_at_meanwhile(accounts, monkeypatch):
    clock = Time()
    accounts._tries = Throttle(clock)
    member(accounts, "ann")
    member(accounts, "bob")
    for _ in range(6):
        with pytest.raises(Refused, match="no such name"):
            accounts.log_in("ann", "wrong password", "there")
    with pytest.raises(Refused, match="too many attempts"):
        accounts.log_in("ann", GOOD, "elsewhere")
    with pytest.raises(Refused, match="too many attempts"):
        accounts.log_in("bob", GOOD, "there")  # from where the guesses came
    assert accounts.log_in("bob", GOOD, "elsewhere")
    clock.now += 1
    assert accounts.log_in("ann", GOOD, "elsewhere")
    assert accounts._tries.wait("name ann") == 0


def test_waits_double_and_end():
    clock = Time()
    throttle = Throttle(clock, free=2, longest=10, names=3)
    waits = []
    for _ in range(8):
        throttle.failed("a")
        waits.append(throttle.wait("a"))
    assert waits == [0, 0, 1, 2, 4, 8, 10, 10]
    clock.now += 21
    throttle.failed("a")
    assert throttle.wait("a") == 0  # long ago
    for name in "bcd":
        for _ in range(3):
            throttle.failed(name)
    assert (throttle.wait("a"), throttle.wait("d")) == (0, 1)  # the oldest was forgotten


def test_an_invitation_works_once_and_for_a_while(accounts, time):
    token = accounts.invite("p", "annotator")
    assert accounts.invited(token).role == "annotator"
    accounts.accept(token, "ann", GOOD)
    assert accounts.invited(token) is None
    with pytest.raises(Refused, match="over or was used"):
        accounts.accept(token, "bob", GOOD)
    late = accounts.invite("p", "annotator")
    time.now += INVITATION_S + 1
    with pytest.raises(Refused, match="over or was used"):
        accounts.accept(late, "bob", GOOD)
    assert list(accounts.members("p")) == ["ann"]


@pytest.mark.parametrize(
    ("name", "password", "problem"),
    [
        ("", GOOD, "empty"), ("x" * 101, GOOD, "too long"), ("a\u202eb", GOOD, "cannot be seen"),
        ("a\nb", GOOD, "cannot be seen"), ("ann", "short", "too short"), ("ann", "x" * 1001, "too long"),
        ("a" * 12, "A" * 12, "it is the name"),
    ],
)  # fmt: skip
def test_a_bad_name_or_password_uses_no_invitation_up(accounts, name, password, problem):
    token = accounts.invite("p", "annotator")
    with pytest.raises(InputError, match=problem):
        accounts.accept(token, name, password)
    assert accounts.accept(token, "ann", GOOD)


def test_an_invitation_by_name_sets_a_new_password_and_ends_the_sessions(accounts):
    session = member(accounts, "ann", "admin")
    token = accounts.invite("p", "annotator", "Ann")
    with pytest.raises(Refused, match="the invitation is for ann"):
        accounts.accept(token, "bob", GOOD)
    fresh = accounts.accept(token, "ann", "another good one")
    assert accounts.who(session) is None
    assert accounts.who(fresh).roles == {"p": "admin"}  # nobody is made less by a link
    with pytest.raises(Refused):
        accounts.log_in("ann", GOOD, "here")
    assert accounts.log_in("ann", "another good one", "here")


def test_nobody_takes_the_name_of_somebody_who_has_judged_without_an_account(accounts, store):
    Desk(store, "p").take("ann")
    with pytest.raises(Refused, match="somebody here has that name"):
        member(accounts, "ann")
    assert accounts.accept(accounts.invite("p", "annotator", "ann"), "ann", GOOD)  # unless it is meant for them


def test_who_has_an_account_joins_another_project(accounts, store):
    add(store, "run/0", project="q")
    session = member(accounts, "ann")
    accounts.join(accounts.invite("q", "reviewer"), accounts.who(session))
    assert accounts.who(session).roles == {"p": "annotator", "q": "reviewer"}
    with pytest.raises(Refused, match="for somebody else"):
        accounts.join(accounts.invite("q", "admin", "bob"), accounts.who(session))


def test_roles_contain_those_below(accounts):
    person = Person("ann", {"p": "reviewer"})
    assert [person.may("p", role) for role in ("annotator", "reviewer", "admin")] == [True, True, False]
    assert not person.may("q", "annotator")


def test_a_project_keeps_an_admin(accounts):
    member(accounts, "ann", "admin")
    for role in ("annotator", None):
        with pytest.raises(InputError, match="the only admin"):
            accounts.set_role("p", "ann", role)
    member(accounts, "bob")
    accounts.set_role("p", "bob", "admin")
    accounts.set_role("p", "ann", "annotator")
    assert accounts.members("p") == {"ann": "annotator", "bob": "admin"}


def test_the_first_admins_link_is_made_until_there_is_one_and_replaces_the_last(accounts):
    first, second = accounts.first_admin("p"), accounts.first_admin("p")
    with pytest.raises(Refused):
        accounts.accept(first, "eve", GOOD)
    accounts.accept(second, "ann", GOOD)
    assert accounts.first_admin("p") is None
    assert accounts.members("p") == {"ann": "admin"}


def test_who_is_taken_out_is_out_at_once_and_gives_back_what_they_hold(accounts, store):
    member(accounts, "bob", "admin")
    session = member(accounts, "ann")
    Desk(store, "p").take("ann")
    accounts.set_role("p", "ann", None)
    assert accounts.who(session) is None
    with store.reading() as db:
        assert db.execute(select(leases.c.state)).scalars().all() == ["returned"]


def test_another_password_ends_the_other_sessions(accounts):
    member(accounts, "ann")
    here, there = accounts.log_in("ann", GOOD, "a"), accounts.log_in("ann", GOOD, "b")
    with pytest.raises(Refused, match="no such name and password"):
        accounts.change_password(here, "not it at all", "another good one")
    with pytest.raises(InputError, match="too short"):
        accounts.change_password(here, GOOD, "short")
    accounts.change_password(here, GOOD, "another good one")
    assert accounts.who(here) is not None
    assert accounts.who(there) is None
    assert accounts.log_in("ann", "another good one", "a")


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda a: a.invite("nowhere", "annotator"), "project"),
        (lambda a: a.invite("p", "owner"), "role"),
        (lambda a: a.set_role("p", "nobody", "admin"), "name"),
        (lambda a: a.set_role("p", "nobody", "owner"), "role"),
        (lambda a: a.handle("p", "nobody"), "annotator"),
        (lambda a: a.behind("p", "nobody"), "annotator"),
    ],
)
def test_what_is_not_there_is_refused(accounts, call, field):
    with pytest.raises(InputError) as error:
        call(accounts)
    assert error.value.field == field


def test_an_erased_annotator_has_no_account_left(accounts, store):
    session = member(accounts, "ann@example.org")
    desk = Desk(store, "p")
    task = desk.take("ann@example.org")
    desk.vote("ann@example.org", task.token, "k" * 16, Judgement(tuple((id,) for id in task.shown)))
    accounts.invite("p", "annotator", "ann@example.org")
    assert accounts.handle("p", "ann@example.org") == store.known("p", "ann@example.org")
    store.erase_annotator("p", store.known("p", "ann@example.org"))
    assert accounts.who(session) is None
    with store.reading() as db:
        left = [
            db.execute(text(f'SELECT * FROM "{table}"')).all()
            for table in ("users", "members", "sessions", "invitations")
        ]
    assert left == [[], [], [], []]
    store.verify()


def test_an_account_outlives_its_erasure_in_one_of_two_projects(accounts, store):
    add(store, "run/0", project="q")
    session = member(accounts, "ann")
    accounts.join(accounts.invite("q", "annotator"), accounts.who(session))
    Desk(store, "p").take("ann")
    store.erase_annotator("p", store.known("p", "ann"))
    assert accounts.who(session).roles == {"q": "annotator"}
