"""A project's settings and guidelines, and the remarks of annotators on their votes."""

import json

import pytest
from annotation_store import add_question, build_judgement, build_prompt, query_rows, record_ranking, tamper
from postgres import create_schema
from sqlalchemy import create_engine

from align.annotate.store import Candidate, ProjectSettings, Store, configure_project, publish_guidelines
from align.annotate.store.integrity import correct_counters
from align.annotate.store.projects import read_guidelines, read_settings, read_state
from align.core.errors import CorruptFile, InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


# Settings


def test_a_project_that_was_never_configured_has_the_defaults(store):
    add_question(store)
    with store.reading() as db:
        assert (read_settings(db, "p"), read_state(db, "p")) == (ProjectSettings(), "open")
        with pytest.raises(InputError, match="no such project"):
            read_settings(db, "nope")


def test_each_change_is_a_row_of_the_ledger_and_no_change_is_none(store):
    configure_project(store, "p", {"overlap": 3, "attributes": ["helpful"]}, state="paused")
    configure_project(store, "p", {"overlap": 3}, state="paused")
    after = configure_project(store, "p", {"quota": 9})
    assert after == ProjectSettings(overlap=3, attributes=("helpful",), quota=9)
    with store.reading() as db:
        assert (read_settings(db, "p"), read_state(db, "p")) == (after, "paused")
    changes = [json.loads(row[0]) for row in query_rows(store, "SELECT payload FROM ledger WHERE kind = 'settings'")]
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
    configure_project(store, "p", {"quota": 5})
    head = store.head()
    with pytest.raises(InputError) as caught:
        configure_project(store, "p", values)
    assert caught.value.field == field
    assert store.head() == head
    with pytest.raises(InputError, match="no such state"):
        configure_project(store, "p", state="asleep")


def test_guidelines_have_versions_and_the_ledger_knows_their_text(store):
    assert publish_guidelines(store, "p", "# One") == 1
    assert publish_guidelines(store, "p", "# One") == 1
    assert publish_guidelines(store, "p", "# Two — schöner") == 2
    with store.reading() as db:
        assert read_guidelines(db, "p") == (2, "# Two — schöner")
        assert read_guidelines(db, "p", 1) == (1, "# One")
        assert read_guidelines(db, "q") is None
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
    add_question(store)
    configure_project(store, "p", {"overlap": 2}, state="paused")
    store.verify()
    tamper(store, statement)
    with pytest.raises(CorruptFile):
        store.verify()


def test_counting_anew_makes_what_is_missing(store):
    item = add_question(store)
    gold = store.add_item("p", "g", build_prompt(), [Candidate("a"), Candidate("b")], expected=[[0], [1]])
    configure_project(store, "p", {"overlap": 3})
    record_ranking(store, item, "0>1>2")
    before = query_rows(store, "SELECT item, wanted, judged, leased, gold FROM work ORDER BY item")
    tamper(store, "DELETE FROM work")
    with store.transaction() as db:
        assert correct_counters(db, "p") == 2
    assert query_rows(store, "SELECT item, wanted, judged, leased, gold FROM work ORDER BY item") == before
    assert {row[0]: row[1:3] for row in before} == {item: (3, 1), gold: (0, 0)}


def test_a_new_project_is_a_row_of_the_ledger(store):
    configure_project(store, "p", {})
    assert store.head().seq == 1
    configure_project(store, "p", {})
    assert store.head().seq == 1


# Remarks of annotators


@pytest.fixture
def remarked(store):
    """Store of four ledger rows: 1 and 2 add items, 3 ranks the first with a remark, 4 the second without."""
    ids = [add_question(store, f"run/{i}") for i in range(2)]
    record_ranking(store, ids[0], "0>1>2", rationale="Xq7 because", demonstration="Xq7 better")
    record_ranking(store, ids[1], "0>1>2")
    assert store.verify().seq == 4
    return store


def test_a_remark_comes_back_and_lies_nowhere_in_the_ledger(remarked):
    first, second = remarked.rankings("p")
    assert (first.rationale, first.demonstration) == ("Xq7 because", "Xq7 better")
    assert (second.rationale, second.demonstration) == ("", "")
    assert not any("Xq7" in row[0] for row in query_rows(remarked, "SELECT payload FROM ledger"))


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
    with pytest.raises(CorruptFile, match="does not mention these texts"):
        remarked.verify()


def test_erasing_the_item_or_the_annotator_takes_the_remark_with_it(remarked):
    item = next(remarked.items("p")).id
    remarked.erase_content("p", item)
    assert query_rows(remarked, "SELECT content FROM remarks") == []
    remarked.verify()
    remaining_item = next(remarked.items("p")).id
    record_ranking(remarked, remaining_item, "2>1>0", annotator="bob", rationale="mine")
    remarked.erase_annotator("p", remarked.pseudonym("p", "bob"))
    assert query_rows(remarked, "SELECT content FROM remarks") == []
    assert len(remarked.rankings("p")) == 2
    remarked.verify()


def test_an_erased_remark_makes_a_repeated_vote_no_other_one(remarked):
    item = list(remarked.items("p"))[1].id
    judgement = build_judgement(item, "0>1>2", rationale="why")
    seq = remarked.record("p", item, judgement, annotator="bob", key="k")
    assert remarked.record("p", item, judgement, annotator="bob", key="k") == seq
    tamper(remarked, f"DELETE FROM remarks WHERE seq = {seq}")
    assert remarked.record("p", item, judgement, annotator="bob", key="k") == seq


def test_the_tables_of_a_shared_database_are_left_alone(postgres):
    url = create_schema(postgres, "shared")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE theirs (id VARCHAR(32))")
        connection.exec_driver_sql("INSERT INTO theirs VALUES ('kept')")
    with Store.open(url) as store:
        assert query_rows(store, "SELECT id FROM theirs") == [("kept",)]
    engine.dispose()
