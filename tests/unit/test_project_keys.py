"""A project's key: made with it, no other's, shown nowhere, and gone with it; and what else goes with a project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from annotation_store import add, asked, rank, tamper
from people import member
from sqlalchemy import insert
from sqlalchemy.exc import SQLAlchemyError

from align.annotate.accounts import Accounts
from align.annotate.exchange.exporting import export_votes
from align.annotate.store import Candidate, Judgement, Store, configure, publish_guidelines
from align.annotate.store.tables import project_keys
from align.core.errors import CorruptFile, InputError
from align.core.types import Conversation, Message

TABLES = (
    "prompts", "candidates", "annotators", "remarks", "drafts", "leases", "work", "projects", "project_keys",
    "guidelines", "members", "invitations",
)  # fmt: skip


def test_each_project_has_a_key_of_its_own_that_stays(store: Store, store_url: str):
    configure(store, "q", {"overlap": 2})
    question = Conversation((Message("user", "2 + 2?"),))
    store.add_item("gold", "x", question, [Candidate("4"), Candidate("5")], expected=[[0], [1]])
    found = [store.key(project) for project in ("p", "q", "gold")]
    assert {len(key or b"") for key in found} == {32}
    assert len({*found}) == 3
    configure(store, "q", {"overlap": 3})
    with Store.open(store_url) as again:
        assert [again.key(project) for project in ("p", "q", "gold")] == found
    with pytest.raises(InputError, match="no such project"):
        store.key("nobody")


def test_what_comes_out_of_a_store_does_not_show_it(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    rank(store, next(iter(store.items("p"))).id, "0>1>2")
    key = store.key("p")
    assert key is not None
    folder = tmp_path / "out"
    folder.mkdir()
    export_votes(store, "p", folder)
    assert not any(key.hex() in path.read_text() for path in folder.iterdir())
    assert key.hex() not in json.dumps(store.entries("p"))
    again = {"project": "p", "key": key.hex()}
    with pytest.raises(SQLAlchemyError, match="project_keys") as caught, store.transaction() as connection:
        connection.execute(insert(project_keys), again)
    assert key.hex() not in str(caught.value)
    assert key.hex() not in caplog.text


def everything(store: Store, project: str) -> dict[str, int]:
    """Table → rows of a project."""
    query = "SELECT count(*) FROM {} WHERE {} = '{}'"
    named = {"projects": "name"}
    return {table: asked(store, query.format(table, named.get(table, "project"), project))[0][0] for table in TABLES}


@pytest.fixture
def full(store: Store, accounts: Accounts) -> Store:
    """Two projects with guidelines, settings, votes with remarks, and people."""
    for project in ("p", "q"):
        item = add(store, "run/9", project=project)
        publish_guidelines(store, project, f"# Be fair in {project}")
        configure(store, project, {"title": "A title"})
        said = Judgement(((f"{item}-0",), (f"{item}-1", f"{item}-2")), rationale="because of Xq7")
        store.record(project, item, said, annotator="ann@example.org", key="k")
        accounts.invite(project, "annotator")
    member(accounts, "carla")
    return store


def test_all_of_a_project_goes_and_nothing_of_another(full: Store, store_url: str, tmp_path: Path):
    before, key, other, head = everything(full, "q"), full.key("p"), full.key("q"), full.head()
    assert everything(full, "p").items() >= {"prompts": 4, "remarks": 1, "members": 1, "project_keys": 1}.items()
    assert key is not None
    tombstone = full.erase_project("p")
    assert tombstone == full.erase_project("p") == head.seq + 1
    assert {*everything(full, "p").values()} == {0}
    assert everything(full, "q") == before
    assert (full.key("p"), full.key("q")) == (None, other)
    assert asked(full, "SELECT name FROM users") == []  # carla was in no other project
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
    acts: dict[str, Callable[[], object]] = {
        "item": lambda: add(full, "new"), "settings": lambda: configure(full, "p", {"overlap": 2}),
        "guidelines": lambda: publish_guidelines(full, "p", "# Again"),
        "invitation": lambda: accounts.invite("p", "annotator"), "vote": lambda: rank(full, item, "0>1>2"),
    }  # fmt: skip
    if act == "known item":  # a run that goes on brings nothing back
        assert add(full, "run/0")
    else:
        with pytest.raises(InputError, match="erased"):
            acts[act]()
    assert {*everything(full, "p").values()} == {0}
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
)  # fmt: skip
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
