"""A project's settings and guidelines, what annotators write beside their votes, and stores of an older schema."""

import json

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from annotation_store import add, ask, asked, rank, said, tamper, url_of
from postgres import new_schema
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import SQLAlchemyError

from align.annotate.store import Candidate, Settings, Store, configure, preferences, publish_guidelines
from align.annotate.store.counting import recount
from align.annotate.store.migrations import VERSION_TABLE
from align.annotate.store.projects import guidelines_of, settings_of, state_of
from align.annotate.store.schema import migrate
from align.annotate.store.tables import metadata
from align.errors import CorruptFile, InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


# Settings


def test_a_project_that_was_never_configured_has_the_defaults(store):
    add(store)
    with store.reading() as db:
        assert (settings_of(db, "p"), state_of(db, "p")) == (Settings(), "open")
        with pytest.raises(InputError, match="no such project"):
            settings_of(db, "nope")


def test_each_change_is_a_row_of_the_ledger_and_no_change_is_none(store):
    configure(store, "p", {"overlap": 3, "attributes": ["helpful"]}, state="paused")
    configure(store, "p", {"overlap": 3}, state="paused")
    after = configure(store, "p", {"quota": 9})
    assert after == Settings(overlap=3, attributes=("helpful",), quota=9)
    with store.reading() as db:
        assert (settings_of(db, "p"), state_of(db, "p")) == (after, "paused")
    changes = [json.loads(row[0]) for row in asked(store, "SELECT payload FROM ledger WHERE kind = 'settings'")]
    assert changes == [{"overlap": 3, "attributes": ["helpful"], "state": "paused"}, {"quota": 9}]
    store.verify()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"overlapp": 2}, "settings"),
        ({"overlap": 0}, "overlap"),
        ({"overlap": True}, "overlap"),
        ({"overlap": 1.5}, "overlap"),
        ({"overlap_share": 1.1}, "overlap_share"),
        ({"gold_share": -0.1}, "gold_share"),
        ({"repeat_share": "half"}, "repeat_share"),
        ({"order": "best"}, "order"),
        ({"lease_minutes": 0}, "lease_minutes"),
        ({"lease_minutes": 1e300}, "lease_minutes"),
        ({"overlap": 10**21}, "overlap"),
        ({"quota": 10**21}, "quota"),
        ({"title": "x" * 201}, "title"),
        ({"attributes": ["x" * 61]}, "attributes"),
        ({"attributes": [f"a{n}" for n in range(13)]}, "attributes"),
        ({"lease_minutes": float("inf")}, "lease_minutes"),
        ({"quota": -1}, "quota"),
        ({"scale": 1}, "scale"),
        ({"attributes": ["a", "a"]}, "attributes"),
        ({"attributes": "helpful"}, "attributes"),
        ({"blurred": 1}, "blurred"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_and_changes_nothing(store, values, field):
    configure(store, "p", {"quota": 5})
    head = store.head()
    with pytest.raises(InputError) as caught:
        configure(store, "p", values)
    assert caught.value.field == field
    assert store.head() == head
    with pytest.raises(InputError, match="no such state"):
        configure(store, "p", state="asleep")


def test_guidelines_have_versions_and_the_ledger_knows_their_text(store):
    assert publish_guidelines(store, "p", "# One") == 1
    assert publish_guidelines(store, "p", "# One") == 1
    assert publish_guidelines(store, "p", "# Two — schöner") == 2
    with store.reading() as db:
        assert guidelines_of(db, "p") == (2, "# Two — schöner")
        assert guidelines_of(db, "p", 1) == (1, "# One")
        assert guidelines_of(db, "q") is None
    store.verify()
    with pytest.raises(InputError, match="empty"):
        publish_guidelines(store, "p", " \n")
    tamper(store, "UPDATE guidelines SET text = '# Forged' WHERE version = 2")
    with pytest.raises(CorruptFile, match="guidelines") as caught:
        store.verify()
    assert caught.value.value == 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE projects SET settings = '{\"overlap\": 5}'",
        "UPDATE projects SET state = 'closed'",
        "UPDATE work SET gold = true",
    ],
)
def test_settings_and_gold_are_those_of_the_ledger(store, statement):
    add(store)
    configure(store, "p", {"overlap": 2}, state="paused")
    store.verify()
    tamper(store, statement)
    with pytest.raises(CorruptFile):
        store.verify()


def test_counting_anew_makes_what_is_missing(store):
    item = add(store)
    gold = store.add_item("p", "g", ask(), [Candidate("a"), Candidate("b")], expected=[[0], [1]])
    configure(store, "p", {"overlap": 3})
    rank(store, item, "0>1>2")
    before = asked(store, "SELECT item, wanted, judged, leased, gold FROM work ORDER BY item")
    tamper(store, "DELETE FROM work")
    with store.transaction() as db:
        assert recount(db, "p") == 2
    assert asked(store, "SELECT item, wanted, judged, leased, gold FROM work ORDER BY item") == before
    assert {row[0]: row[1:3] for row in before} == {item: (3, 1), gold: (0, 0)}


def test_a_new_project_is_a_row_of_the_ledger(store):
    configure(store, "p", {})
    assert store.head().seq == 1
    configure(store, "p", {})
    assert store.head().seq == 1


# What annotators write


@pytest.fixture
def remarked(store):
    """Rows 1 and 2 add items, 3 ranks the first with a remark, 4 the second without."""
    ids = [add(store, f"run/{i}") for i in range(2)]
    rank(store, ids[0], "0>1>2", rationale="Xq7 because", demonstration="Xq7 better")
    rank(store, ids[1], "0>1>2")
    assert store.verify().seq == 4
    return store


def test_a_remark_comes_back_and_lies_nowhere_in_the_ledger(remarked):
    first, second = remarked.rankings("p")
    assert (first.rationale, first.demonstration) == ("Xq7 because", "Xq7 better")
    assert (second.rationale, second.demonstration) == ("", "")
    assert not any("Xq7" in row[0] for row in asked(remarked, "SELECT payload FROM ledger"))


@pytest.mark.parametrize(
    ("statement", "bad"),
    [
        ('UPDATE remarks SET content = \'{"rationale": "forged"}\'', 3),
        ("UPDATE remarks SET item = 'other'", 3),
        ("DELETE FROM remarks", 3),
        ("UPDATE remarks SET seq = 4", 3),
        ("INSERT INTO remarks SELECT project, 4, item, annotator, content, salt FROM remarks", 4),
    ],
)
def test_verify_names_the_vote_whose_remark_was_touched(remarked, statement, bad):
    tamper(remarked, statement)
    with pytest.raises(CorruptFile) as caught:
        remarked.verify()
    assert (caught.value.field, caught.value.value) == ("ledger.seq", bad)


def test_a_remark_of_no_vote_is_found(remarked):
    tamper(remarked, "INSERT INTO remarks SELECT project, 99, item, annotator, content, salt FROM remarks")
    with pytest.raises(CorruptFile, match="no such text"):
        remarked.verify()


def test_erasing_the_item_or_the_annotator_takes_the_remark_with_it(remarked):
    item = next(remarked.items("p")).id
    remarked.erase_content("p", item)
    assert asked(remarked, "SELECT content FROM remarks") == []
    remarked.verify()
    other = next(remarked.items("p")).id
    rank(remarked, other, "2>1>0", annotator="bob", rationale="mine")
    remarked.erase_annotator("p", remarked.known("p", "bob"))
    assert asked(remarked, "SELECT content FROM remarks") == []
    assert len(remarked.rankings("p")) == 2
    remarked.verify()


def test_an_erased_remark_makes_a_repeated_vote_no_other_one(remarked):
    item = list(remarked.items("p"))[1].id
    judgement = said(item, "0>1>2", rationale="why")
    seq = remarked.record("p", item, judgement, annotator="bob", key="k")
    assert remarked.record("p", item, judgement, annotator="bob", key="k") == seq
    tamper(remarked, f"DELETE FROM remarks WHERE seq = {seq}")
    assert remarked.record("p", item, judgement, annotator="bob", key="k") == seq


# Older stores


def test_a_new_store_has_the_tables_that_the_code_speaks_of(store):
    with store.reading() as db:
        context = MigrationContext.configure(db, opts={"version_table": VERSION_TABLE, "compare_type": True})
        found = compare_metadata(context, metadata)
    # SQLite does not tell in which direction an index goes; `test_gold_and_repeats` asks its planner about that one.
    assert [change for change in found if getattr(change[1], "name", "") != "work_by_priority"] == []


def old_store(url, version):
    """A store as an earlier version left it: two items, the first ranked by two people, one of whom took it back."""
    with Store.open(url) as store:
        ids = [add(store, f"run/{i}") for i in range(2)]
        for who in ("ann", "bob"):
            seq = rank(store, ids[0], "0>1>2", annotator=who)
        store.retract("p", seq)
        rank(store, ids[1], "0>1>2", source="simulated")
        head = store.head()
    assignment = ("projects", "guidelines", "remarks", "work", "leases", "drafts", VERSION_TABLE)
    before = assignment if version == 1 else ()
    accounts = ("sessions", "members", "invitations", "users") if version < 3 else ()
    gone = ("project_keys", *accounts, *before)
    undone = [f"DROP TABLE {name}" for name in gone]
    if version == 1:
        undone.append("DROP INDEX ledger_by_annotator")
        if "postgresql" in url:
            undone += ["DROP TRIGGER ledger_append_only ON ledger", "DROP FUNCTION align_append_only()"]
    else:
        undone.append(f"UPDATE {VERSION_TABLE} SET version_num = '000{version}'")
    changed(url, *undone, f"UPDATE align_store SET schema_version = {version}")
    return ids, head


def changed(url, *statements):
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_older_store_is_refused_with_the_command_and_then_brought_up_to_date(store_url, tmp_path, version):
    ids, head = old_store(store_url, version)
    with pytest.raises(InputError, match=rf"schema_version {version}, of an older align.*stage\.action=migrate"):
        Store.open(store_url)
    assert migrate(store_url) == (version, 4)
    assert migrate(store_url) == (4, 4)
    with Store.open(store_url) as store:
        assert store.verify(head) == head
        assert len(preferences(store, "p", allow_simulated=True)) == 6
        assert asked(store, "SELECT name, settings, state FROM projects") == [("p", "{}", "open")]
        key = store.key("p")
        assert key is not None
        assert len(key) == 32
        counted = asked(store, "SELECT item, wanted, judged, leased FROM work ORDER BY judged DESC")
        assert counted == [(ids[0], 1, 1, 0), (ids[1], 1, 0, 0)]
        shuffled = dict(asked(store, "SELECT item, shuffle FROM work"))
        with store.reading() as db:
            context = MigrationContext.configure(db, opts={"version_table": VERSION_TABLE})
            missing = [
                c for c in compare_metadata(context, metadata) if getattr(c[1], "name", "") != "work_by_priority"
            ]
        assert missing == []
    with Store.open(f"sqlite:///{tmp_path / 'new.db'}") as new:
        assert [add(new, f"run/{i}") for i in range(2)] == ids
        assert dict(asked(new, "SELECT item, shuffle FROM work")) == shuffled


def test_a_migration_that_fails_leaves_the_store_as_it_was(store_url):
    _, head = old_store(store_url, 1)
    changed(store_url, "CREATE TABLE drafts (x INTEGER)")  # what the migration is going to make
    with pytest.raises((InputError, SQLAlchemyError)):
        migrate(store_url)
    engine = create_engine(store_url)
    tables = set(inspect(engine).get_table_names())
    engine.dispose()
    assert tables == {"align_store", "prompts", "candidates", "annotators", "ledger", "drafts"}
    changed(store_url, "DROP TABLE drafts")
    assert migrate(store_url) == (1, 4)
    with Store.open(store_url) as store:
        assert store.verify(head) == head


def test_there_is_nothing_to_migrate_where_there_is_no_store(tmp_path):
    with pytest.raises(InputError, match="there is no store"):
        migrate(url_of(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_tables_of_a_shared_database_are_left_alone(postgres):
    url = new_schema(postgres, "shared")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('theirs')")
    with Store.open(url) as store:
        assert asked(store, "SELECT version_num FROM alembic_version") == [("theirs",)]
    engine.dispose()
