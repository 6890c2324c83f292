"""Accounts: passwords, sessions, invitations, roles, and the erasure of people."""

from __future__ import annotations

import pytest
from annotation_store import add_question
from annotator_accounts import GOOD, accept_invitation
from assignment_queues import cast_vote
from sqlalchemy import select, text

from align.annotate.accounts import INVITATION_S, SESSION_S, Accounts, Person
from align.annotate.assignment import AssignmentQueue
from align.annotate.store import Judgement
from align.annotate.store.tables import invitations, leases, members, sessions, users
from align.core.errors import InputError
from align.web.credentials import AccessRefused


def test_nothing_in_the_database_lets_anybody_in(accounts, store):
    token = accounts.invite("p", "annotator")
    session = accounts.accept(token, "ann", GOOD)
    second_token = accounts.invite("p", "annotator")
    with store.reading() as db:
        stored_text = str([db.execute(select(table)).all() for table in (users, sessions, invitations, members)])
    assert not any(secret in stored_text for secret in (token, second_token, session, GOOD))
    assert "$argon2id$" in stored_text


def test_the_default_hasher_costs_what_the_rfc_asks(store):
    assert "$argon2id$v=19$m=65536,t=3,p=4$" in Accounts(store).passwords.hash_password("x")


def test_a_session_is_its_persons_until_it_is_over(accounts, time):
    accept_invitation(accounts, "ann", "reviewer")
    session = accounts.log_in("ann", GOOD, "here")
    assert accounts.authenticate_session(session) == Person("ann", {"p": "reviewer"})
    time.now += SESSION_S - 1
    assert accounts.authenticate_session(session) is not None  # a look-up extends the session
    time.now += SESSION_S - 1
    assert accounts.authenticate_session(session) is not None
    time.now += SESSION_S + 1
    assert accounts.authenticate_session(session) is None
    second_session = accounts.log_in("ann", GOOD, "here")
    accounts.log_out(second_session)
    assert accounts.authenticate_session(second_session) is None
    assert accounts.authenticate_session("") is accounts.authenticate_session("x" * 43) is None


@pytest.mark.parametrize("name", ["ANN X", " ann  x ", "ａｎｎ x"])
def test_a_name_is_known_however_it_is_written(accounts, name):
    accept_invitation(accounts, "Ann X")
    assert accounts.authenticate_session(accounts.log_in(name, GOOD, "here")).name == "ann x"
    with pytest.raises(AccessRefused, match="the name is taken"):
        accept_invitation(accounts, name)


def test_an_invitation_works_once_and_for_a_while(accounts, time):
    token = accounts.invite("p", "annotator")
    assert accounts.find_invitation(token).role == "annotator"
    accounts.accept(token, "ann", GOOD)
    assert accounts.find_invitation(token) is None
    with pytest.raises(AccessRefused, match="expired or was used"):
        accounts.accept(token, "bob", GOOD)
    late_token = accounts.invite("p", "annotator")
    time.now += INVITATION_S + 1
    with pytest.raises(AccessRefused, match="expired or was used"):
        accounts.accept(late_token, "bob", GOOD)
    assert list(accounts.list_members("p")) == ["ann"]


@pytest.mark.parametrize(
    ("name", "password", "problem"),
    [
        ("", GOOD, "empty"),
        ("x" * 101, GOOD, "too long"),
        ("a\u202eb", GOOD, "invisible characters"),
        ("a\nb\u200b", GOOD, "invisible characters"),
        ("ann\ufe0f", GOOD, "invisible characters"),
        ("\u2800", GOOD, "invisible characters"),
        ("\u0430nn", GOOD, "two alphabets"),
        ("ann", "short", "too short"),
        ("ann", "x" * 1001, "too long"),
        ("a" * 12, "A" * 12, "it is the name"),
    ],
)
def test_a_bad_name_or_password_uses_no_invitation_up(accounts, name, password, problem):
    token = accounts.invite("p", "annotator")
    with pytest.raises(InputError, match=problem):
        accounts.accept(token, name, password)
    assert accounts.accept(token, "ann", GOOD)


def test_an_invitation_by_name_sets_a_new_password_and_ends_the_sessions(accounts):
    session = accept_invitation(accounts, "ann", "admin")
    token = accounts.invite("p", "annotator", "Ann")
    with pytest.raises(AccessRefused, match="the invitation is for ann"):
        accounts.accept(token, "bob", GOOD)
    new_session = accounts.accept(token, "ann", "another good one")
    assert accounts.authenticate_session(session) is None
    assert accounts.authenticate_session(new_session).roles == {"p": "admin"}  # an invitation never lowers a role
    with pytest.raises(AccessRefused):
        accounts.log_in("ann", GOOD, "here")
    assert accounts.log_in("ann", "another good one", "here")


def test_nobody_takes_the_name_of_somebody_who_has_judged_without_an_account(accounts, store):
    AssignmentQueue(store, "p").take("ann")
    with pytest.raises(AccessRefused, match="the name is taken"):
        accept_invitation(accounts, "ann")
    assert accounts.accept(accounts.invite("p", "annotator", "ann"), "ann", GOOD)  # an invitation by name works


def test_who_has_an_account_joins_another_project(accounts, store):
    add_question(store, "run/0", project="q")
    session = accept_invitation(accounts, "ann")
    accounts.join(accounts.invite("q", "reviewer"), accounts.authenticate_session(session))
    assert accounts.authenticate_session(session).roles == {"p": "annotator", "q": "reviewer"}
    with pytest.raises(AccessRefused, match="for another person"):
        accounts.join(accounts.invite("q", "admin", "bob"), accounts.authenticate_session(session))


def test_roles_contain_those_below(accounts):
    person = Person("ann", {"p": "reviewer"})
    assert [person.has_role("p", role) for role in ("annotator", "reviewer", "admin")] == [True, True, False]
    assert not person.has_role("q", "annotator")


def test_a_project_keeps_an_admin(accounts):
    accept_invitation(accounts, "ann", "admin")
    for role in ("annotator", None):
        with pytest.raises(InputError, match="the only admin"):
            accounts.set_role("p", "ann", role)
    accept_invitation(accounts, "bob")
    accounts.set_role("p", "bob", "admin")
    accounts.set_role("p", "ann", "annotator")
    assert accounts.list_members("p") == {"ann": "annotator", "bob": "admin"}


def test_the_first_admins_link_is_made_until_there_is_one_and_replaces_the_last(accounts):
    first_token = accounts.invite_first_admin("p")
    second_token = accounts.invite_first_admin("p")
    with pytest.raises(AccessRefused):
        accounts.accept(first_token, "eve", GOOD)
    accounts.accept(second_token, "ann", GOOD)
    assert accounts.invite_first_admin("p") is None
    assert accounts.list_members("p") == {"ann": "admin"}


def test_who_is_taken_out_is_out_at_once_and_gives_back_what_they_hold(accounts, store):
    accept_invitation(accounts, "bob", "admin")
    session = accept_invitation(accounts, "ann")
    AssignmentQueue(store, "p").take("ann")
    accounts.set_role("p", "ann", None)
    assert accounts.authenticate_session(session) is None
    with store.reading() as db:
        assert db.execute(select(leases.c.state)).scalars().all() == ["returned"]


def test_another_password_ends_the_other_sessions(accounts):
    accept_invitation(accounts, "ann")
    current_session = accounts.log_in("ann", GOOD, "a")
    other_session = accounts.log_in("ann", GOOD, "b")
    with pytest.raises(AccessRefused, match="no such name and password"):
        accounts.change_password(current_session, "not it at all", "another good one")
    with pytest.raises(InputError, match="too short"):
        accounts.change_password(current_session, GOOD, "short")
    accounts.change_password(current_session, GOOD, "another good one")
    assert accounts.authenticate_session(current_session) is not None
    assert accounts.authenticate_session(other_session) is None
    assert accounts.log_in("ann", "another good one", "a")


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda a: a.invite("nowhere", "annotator"), "project"),
        (lambda a: a.invite("p", "owner"), "role"),
        (lambda a: a.set_role("p", "nobody", "admin"), "name"),
        (lambda a: a.set_role("p", "nobody", "owner"), "role"),
        (lambda a: a.get_handle("p", "nobody"), "annotator"),
        (lambda a: a.resolve_handle("p", "nobody"), "annotator"),
    ],
)
def test_what_is_not_there_is_refused(accounts, call, field):
    with pytest.raises(InputError) as error:
        call(accounts)
    assert error.value.field == field


def test_an_erased_annotator_has_no_account_left(accounts, store):
    session = accept_invitation(accounts, "ann@example.org")
    queue = AssignmentQueue(store, "p")
    task = queue.take("ann@example.org")
    cast_vote(queue, "ann@example.org", task, "k" * 16, Judgement(tuple((id,) for id in task.display_order)))
    accounts.invite("p", "annotator", "ann@example.org")
    assert accounts.get_handle("p", "ann@example.org") == store.pseudonym("p", "ann@example.org")
    store.erase_annotator("p", store.pseudonym("p", "ann@example.org"))
    assert accounts.authenticate_session(session) is None
    with store.reading() as db:
        remaining_rows = [
            db.execute(text(f'SELECT * FROM "{table}"')).all()
            for table in ("users", "members", "sessions", "invitations")
        ]
    assert remaining_rows == [[], [], [], []]
    store.verify()


def test_an_account_outlives_its_erasure_in_one_of_two_projects(accounts, store):
    add_question(store, "run/0", project="q")
    session = accept_invitation(accounts, "ann")
    accounts.join(accounts.invite("q", "annotator"), accounts.authenticate_session(session))
    AssignmentQueue(store, "p").take("ann")
    store.erase_annotator("p", store.pseudonym("p", "ann"))
    assert accounts.authenticate_session(session).roles == {"q": "annotator"}


def test_an_admin_of_one_project_takes_over_nobodys_account_in_another(accounts, store):
    add_question(store, "run/0", project="q")
    root = accept_invitation(accounts, "root", "admin", "q")
    eve = accounts.authenticate_session(accept_invitation(accounts, "eve", "admin"))
    token = accounts.invite("p", "annotator", "root", inviter=eve)
    assert not accounts.find_invitation(token).resets
    with pytest.raises(AccessRefused, match="projects of other admins"):
        accounts.accept(token, "root", GOOD)
    accounts.join(token, accounts.authenticate_session(root))  # root may use the link
    assert accounts.authenticate_session(root).roles == {"p": "annotator", "q": "admin"}
    ann = accept_invitation(accounts, "ann")
    assert accounts.authenticate_session(ann) is not None
    accounts.accept(accounts.invite("p", "annotator", "ann", inviter=eve), "ann", "another good one")
    # An invitation by the operator may reset a password.
    accounts.accept(accounts.invite("p", "annotator", "root"), "root", "another good one")


def test_links_end_with_a_new_password_and_with_the_role_of_who_made_them(accounts):
    accept_invitation(accounts, "root", "admin")
    eve = accounts.authenticate_session(accept_invitation(accounts, "eve", "admin"))
    session = accept_invitation(accounts, "ann")
    tokens = [accounts.invite("p", "annotator", "ann") for _ in range(3)]
    accounts.accept(tokens[0], "ann", "another good one")
    assert accounts.find_invitation(tokens[1]) is None
    tokens = [accounts.invite("p", "annotator", "ann")]
    assert accounts.authenticate_session(session) is None
    new_session = accounts.log_in("ann", "another good one", "here")
    accounts.change_password(new_session, "another good one", GOOD)
    assert accounts.find_invitation(tokens[0]) is None
    for role in ("annotator", None):
        admin_token = accounts.invite("p", "admin", inviter=eve)
        accounts.set_role("p", "eve", role)
        assert accounts.find_invitation(admin_token) is None
        if role:
            accounts.set_role("p", "eve", "admin")


def test_links_that_are_out_are_listed_and_taken_back(accounts, store, time):
    add_question(store, "run/0", project="q")
    root = accounts.authenticate_session(accept_invitation(accounts, "root", "admin"))
    first_token = accounts.invite("p", "annotator", "Ann", inviter=root)
    time.now += 60
    second_token = accounts.invite("p", "reviewer")
    foreign_token = accounts.invite("q", "annotator")
    assert [(link.role, link.name, link.made_by) for link in accounts.list_invitations("p")] == [
        ("annotator", "ann", "root"),
        ("reviewer", "", ""),
    ]
    assert accounts.list_invitations("p")[0].expires_at == time.now - 60 + INVITATION_S
    accounts.revoke("p", accounts.list_invitations("p")[0].id)
    assert accounts.find_invitation(first_token) is None
    with pytest.raises(AccessRefused, match="expired or was used"):
        accounts.accept(first_token, "ann", GOOD)
    foreign_id = accounts.list_invitations("q")[0].id
    for invitation_id in (
        foreign_id,
        "",
        "%" * 12,
        "_" * 12,
        accounts.list_invitations("p")[0].id[:5],
    ):  # an admin of p cannot revoke links of q
        with pytest.raises(InputError, match="has ended"):
            accounts.revoke("p", invitation_id)
    assert accounts.find_invitation(second_token) is not None
    assert accounts.find_invitation(foreign_token) is not None
    time.now += INVITATION_S
    assert accounts.list_invitations("p") == []


def test_a_member_who_never_judged_can_be_erased(accounts, store):
    accept_invitation(accounts, "Yan@Example.org")
    store.erase_annotator("p", accounts.ensure_pseudonym("p", "yan@example.org"))
    accounts.invite("p", "annotator", "zoe@example.org")
    store.erase_annotator("p", accounts.ensure_pseudonym("p", "Zoe@example.org"))
    with store.reading() as db:
        assert [db.execute(select(table)).all() for table in (users, members, invitations)] == [[], [], []]
    with pytest.raises(InputError, match="no such annotator"):
        accounts.ensure_pseudonym("p", "nobody")
    store.verify()


def test_with_the_account_go_its_invitations_everywhere(accounts, store):
    add_question(store, "run/0", project="q")
    accept_invitation(accounts, "ann")
    accept_invitation(accounts, "root", "admin")
    accounts.invite("q", "annotator", "ann")
    accounts.set_role("p", "ann", None)
    with store.reading() as db:
        assert db.execute(select(invitations)).all() == []


def test_what_is_over_is_not_kept(accounts, store, time):
    accept_invitation(accounts, "ann")
    accounts.invite("p", "annotator", "bob")
    time.now += SESSION_S + 1
    accounts.invite_first_admin("p")
    accounts.log_in("ann", GOOD, "here")
    with store.reading() as db:
        assert len(db.execute(select(sessions)).all()) == 1
        assert {row.name for row in db.execute(select(invitations))} == {""}
