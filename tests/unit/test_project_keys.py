"""A project's key: created with the project, unique, never shown; and erasure of the project with its key and rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_store import add_question, query_rows, record_ranking, tamper
from annotator_accounts import accept_invitation
from sqlalchemy import insert
from sqlalchemy.exc import SQLAlchemyError

from align.annotate.accounts import Accounts
from align.annotate.exchange.exporting import export_votes
from align.annotate.store import Candidate, Judgement, Store, configure_project, publish_guidelines
from align.annotate.store.tables import project_keys
from align.core.errors import CorruptFile, InputError
from align.core.types import Conversation, Message

TABLES = (
    "prompts",
    "candidates",
    "annotators",
    "remarks",
    "drafts",
    "leases",
    "work",
    "projects",
    "project_keys",
    "guidelines",
    "members",
    "invitations",
)


def test_each_project_has_a_key_of_its_own_that_stays(store: Store, store_url: str):
    configure_project(store, "q", {"overlap": 2})
    question = Conversation((Message("user", "2 + 2?"),))
    store.add_item("gold", "x", question, [Candidate("4"), Candidate("5")], expected=[[0], [1]])
    keys = [store.key(project) for project in ("p", "q", "gold")]
    assert {len(key or b"") for key in keys} == {32}
    assert len({*keys}) == 3
    configure_project(store, "q", {"overlap": 3})
    with Store.open(store_url) as reopened:
        assert [reopened.key(project) for project in ("p", "q", "gold")] == keys
    with pytest.raises(InputError, match="no such project"):
        store.key("nobody")


def test_what_comes_out_of_a_store_does_not_show_it(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    record_ranking(store, next(iter(store.items("p"))).id, "0>1>2")
    key = store.key("p")
    assert key is not None
    folder = tmp_path / "out"
    folder.mkdir()
    export_votes(store, "p", folder)
    assert not any(key.hex() in path.read_text() for path in folder.iterdir())
    assert key.hex() not in json.dumps(store.entries("p"))
    duplicate = {"project": "p", "key": key.hex()}
    with pytest.raises(SQLAlchemyError, match="project_keys") as caught, store.transaction() as connection:
        connection.execute(insert(project_keys), duplicate)
    assert key.hex() not in str(caught.value)
    assert key.hex() not in caplog.text


def count_rows(store: Store, project: str) -> dict[str, int]:
    """Count the rows of a project in each table."""
    query = "SELECT count(*) FROM {} WHERE {} = '{}'"
    project_columns = {"projects": "name"}
    return {
        table: query_rows(store, query.format(table, project_columns.get(table, "project"), project))[0][0]
        for table in TABLES
    }


@pytest.fixture
def full(store: Store, accounts: Accounts) -> Store:
    """Store with two projects that have guidelines, settings, votes with remarks, and members."""
    for project in ("p", "q"):
        item = add_question(store, "run/9", project=project)
        publish_guidelines(store, project, f"# Be fair in {project}")
        configure_project(store, project, {"title": "A title"})
        judgement = Judgement(((f"{item}-0",), (f"{item}-1", f"{item}-2")), rationale="because of Xq7")
        store.record(project, item, judgement, annotator="ann@example.org", key="k")
        accounts.invite(project, "annotator")
    accept_invitation(accounts, "carla")
    return store


def test_all_of_a_project_goes_and_nothing_of_another(full: Store, store_url: str, tmp_path: Path):
    counts_of_q = count_rows(full, "q")
    key = full.key("p")
    key_of_q = full.key("q")
    head = full.head()
    assert count_rows(full, "p").items() >= {"prompts": 4, "remarks": 1, "members": 1, "project_keys": 1}.items()
    assert key is not None
    tombstone = full.erase_project("p")
    assert tombstone == full.erase_project("p") == head.seq + 1
    assert {*count_rows(full, "p").values()} == {0}
    assert count_rows(full, "q") == counts_of_q
    assert (full.key("p"), full.key("q")) == (None, key_of_q)
    assert query_rows(full, "SELECT name FROM users") == []  # carla was in no other project
    assert full.verify(head).seq == tombstone
    if "sqlite" in store_url:
        files = [path.read_bytes() for path in tmp_path.iterdir()]
        assert not any(key.hex().encode() in data for data in files)
        assert sum(b"because of Xq7" in data for data in files) == sum(b"Be fair in q" in data for data in files)
    assert full.rankings("p") == []
    assert list(full.items("p")) == []


@pytest.mark.parametrize("act", ["item", "known item", "settings", "guidelines", "invitation", "vote"])
def test_its_name_is_not_used_again(full: Store, accounts: Accounts, act: str):
    item = next(iter(full.items("p"))).id
    full.erase_project("p")
    actions: dict[str, Callable[[], object]] = {
        "item": lambda: add_question(full, "new"),
        "settings": lambda: configure_project(full, "p", {"overlap": 2}),
        "guidelines": lambda: publish_guidelines(full, "p", "# Again"),
        "invitation": lambda: accounts.invite("p", "annotator"),
        "vote": lambda: record_ranking(full, item, "0>1>2"),
    }
    if act == "known item":  # a continued run restores nothing
        assert add_question(full, "run/0")
    else:
        with pytest.raises(InputError, match="erased"):
            actions[act]()
    assert {*count_rows(full, "p").values()} == {0}
    full.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO prompts VALUES ('p', 'stranger', '[]', 's')",
        "INSERT INTO annotators VALUES ('p', 'a1', 'ann', 's')",
        "INSERT INTO guidelines VALUES ('p', 1, '# Be fair in p')",
    ],
)
def test_what_went_must_not_come_back(full: Store, statement: str):
    tombstone = full.erase_project("p")
    tamper(full, statement)
    with pytest.raises(CorruptFile) as caught:
        full.verify()
    assert caught.value.value == tombstone


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("DELETE FROM project_keys WHERE project = 'p'", "its key is missing"),
        ("UPDATE project_keys SET key = 'abc' WHERE project = 'p'", "not one of 32 bytes"),
        (f"INSERT INTO project_keys (project, key) VALUES ('nobody', '{'0' * 64}')", "the project does not"),
    ],
)
def test_a_store_without_the_keys_that_it_should_have_is_not_what_was_written(
    full: Store, statement: str, problem: str
) -> None:
    full.verify()
    tamper(full, statement)
    with pytest.raises(CorruptFile, match=problem):
        full.verify()


def test_a_key_that_is_there_again_after_an_erasure_is_found(full: Store) -> None:
    full.erase_project("p")
    full.verify()
    tamper(full, f"INSERT INTO project_keys (project, key) VALUES ('p', '{'0' * 64}')")
    with pytest.raises(CorruptFile, match="the project does not"):
        full.verify()
