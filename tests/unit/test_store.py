"""The annotation store: items and rankings read back, preference pairs, and refused input."""

import sqlite3

import pytest
from annotation_store import add_question, build_prompt, build_store_url, count_table_rows, record_ranking, tamper

from align.annotate.store import Candidate, Judgement, Store
from align.annotate.store.connections import SCHEMA_VERSION
from align.annotate.store.preference_pairs import load_preferences
from align.annotate.store.vote_selection import VoteSelection
from align.core.errors import CorruptFile, InputError, StorageError
from align.core.types import Conversation, Message


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


# Items and rankings


def test_items_come_back_as_they_were_added(store):
    answers = [
        Candidate("Hi \U0001f600", "base", "adapter", {"temperature": 0.7, "seed": 3}, ended=True),
        Candidate("", "base", "", {}, ended=False),
    ]
    prompt = Conversation((Message("system", "Be kind."), Message("user", "Grüße\n\nund 'Zeichen'")))
    item = store.add_item("p", "run/0", prompt, answers)
    (stored,) = store.items("p")
    assert stored.id == stored.prompt.id == item
    assert stored.prompt.messages == prompt.messages
    assert [c.id for c in stored.candidates] == [f"{item}-0", f"{item}-1"]
    for answer, candidate in zip(answers, stored.candidates, strict=True):
        for name in ("text", "model_digest", "adapter_digest", "sampling", "ended"):
            assert getattr(candidate, name) == getattr(answer, name)


def test_items_keep_their_order_over_pages(store, monkeypatch):
    monkeypatch.setattr("align.annotate.store.database.ITEMS_PER_READ", 3)
    ids = [add_question(store, f"run/{i}") for i in range(8)]
    assert [item.id for item in store.items("p")] == ids
    read_ids = []
    for item in store.items("p"):  # writing between two items neither skips nor repeats
        read_ids.append(item.id)
        record_ranking(store, item.id, "0>1>2")
    assert read_ids == ids


def test_adding_again_changes_nothing_and_other_content_is_refused(store):
    item = add_question(store)
    before = count_table_rows(store), store.head()
    assert add_question(store) == item
    assert (count_table_rows(store), store.head()) == before
    with pytest.raises(InputError) as caught:
        add_question(store, texts=("fine", "bad", "other"))
    assert (caught.value.field, caught.value.value) == ("key", "run/0")
    with pytest.raises(InputError, match="other content"):
        add_question(store, texts=("fine", "bad"))
    assert add_question(store, project="q") != item  # the same key in another project is another item
    assert (count_table_rows(store)["candidates"], store.head().seq) == (6, 2)


def test_a_key_returns_the_first_ranking_and_refuses_another(store):
    item = add_question(store)
    first = record_ranking(store, item, "0>12", key="k", strength=2)
    assert record_ranking(store, item, "0>21", key="k", strength=2) == first  # order within a tier is ignored
    for changed_judgement in ({"order": "0>1>2", "strength": 2}, {"order": "0>12", "strength": 1}):
        with pytest.raises(InputError, match="another judgement"):
            record_ranking(store, item, key="k", **changed_judgement)
    with pytest.raises(InputError, match="another judgement"):
        record_ranking(store, item, "0>12", key="k", strength=2, annotator="bob")
    assert len(store.rankings("p")) == 1


def test_a_ranking_comes_back_with_everything_that_was_said(store):
    item = add_question(store)
    seq = record_ranking(store, item, "2>01", strength=3, guideline_version="v2")
    (ranking,) = store.rankings("p")
    assert (ranking.seq, ranking.item) == (seq, item)
    assert ranking.tiers == ((f"{item}-2",), (f"{item}-0", f"{item}-1"))
    assert (ranking.source, ranking.strength, ranking.guideline_version) == ("human", 3, "v2")
    assert ranking.annotator == store.pseudonym("p", "ann@example.org") != "ann@example.org"
    assert ranking.created_at.endswith("+00:00")


def test_undo_takes_a_ranking_out_and_lets_it_be_made_again(store):
    item = add_question(store)
    first = record_ranking(store, item, "0>1>2")
    with pytest.raises(InputError, match=rf"stands \(seq {first}\)"):
        record_ranking(store, item, "2>1>0")
    retraction = store.retract("p", first)
    assert store.retract("p", first) == retraction
    assert store.rankings("p") == []
    second = record_ranking(store, item, "2>1>0")
    assert [r.seq for r in store.rankings("p")] == [second]
    with pytest.raises(InputError, match="no judgement"):
        store.retract("p", retraction)
    store.verify()


def test_a_transaction_commits_all_or_nothing(store):
    add_question(store)
    before = count_table_rows(store), store.head()

    def fail_halfway():
        with store.transaction():
            add_question(store, "run/1")
            assert store.head().seq == 2  # its own writes are visible inside
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert (count_table_rows(store), store.head()) == before
    store.verify()


# Pairs


def test_pairs_are_those_across_tiers(store):
    item = add_question(store, texts=("a", "b", "c", "d"))
    record_ranking(store, item, "2>03>1", strength=1, guideline_version="v1")
    pairs = load_preferences(store, "p")
    assert [(p.chosen[0].content, p.rejected[0].content) for p in pairs] == [
        ("c", "a"),
        ("c", "d"),
        ("c", "b"),
        ("a", "b"),
        ("d", "b"),
    ]
    assert {p.group_id for p in pairs} == {item}
    assert {p.prompt for p in pairs} == {build_prompt("question of run/0").messages}
    assert {(p.source, p.strength, p.guideline_version, p.margin) for p in pairs} == {("human", 1, "v1", None)}
    assert {p.annotator for p in pairs} == {store.pseudonym("p", "ann@example.org")}
    assert len({p.id for p in pairs}) == 5


def test_the_same_text_twice_yields_no_pair(store):
    record_ranking(store, add_question(store, texts=("same", "same", "other")), "0>1>2")
    assert len(load_preferences(store, "p")) == 2


def test_simulated_rankings_are_refused_unless_asked_for(store):
    record_ranking(store, add_question(store), "0>1>2")
    record_ranking(store, add_question(store, "run/1"), "0>1>2", source="simulated")
    with pytest.raises(InputError, match=r"1 of its 2 rankings are simulated.*data\.allow_simulated=true"):
        load_preferences(store, "p")
    assert len(load_preferences(store, "p", VoteSelection(allow_simulated=True))) == 6


def test_retracted_and_erased_rankings_yield_no_pairs(store):
    ids = [add_question(store, f"run/{i}") for i in range(3)]
    seqs = [record_ranking(store, item, "0>1>2") for item in ids]
    store.retract("p", seqs[0])
    store.erase_content("p", ids[1])
    assert {p.group_id for p in load_preferences(store, "p")} == {ids[2]}


# Refusals


@pytest.mark.parametrize(
    "order",
    ["0>1", "0>1>2>3", "0>1>2>0", "0>1>>2"],
    ids=["one is missing", "one is unknown", "one twice", "empty tier"],
)
def test_a_ranking_covers_exactly_the_candidates(store, order):
    item = add_question(store)
    with pytest.raises(InputError) as caught:
        record_ranking(store, item, order)
    assert caught.value.field == "tiers"
    assert count_table_rows(store)["annotators"] == 0  # a refused ranking leaves nothing behind


@pytest.mark.parametrize(
    ("act", "field", "value"),
    [
        (lambda s: add_question(s, "run/9", texts=("only",)), "candidates", 1),
        (lambda s: add_question(s, project=" "), "project", " "),
        (lambda s: s.items("nope"), "project", "nope"),
        (lambda s: s.rankings("nope"), "project", "nope"),
        (lambda s: s.head("nope"), "project", "nope"),
        (lambda s: load_preferences(s, "p"), "project", "p"),
        (lambda s: record_ranking(s, "nope", "0>1>2"), "item", "nope"),
        (lambda s: s.record("nope", "i", Judgement((("x",),)), annotator="a", key="k"), "project", "nope"),
        (lambda s: s.erase_content("p", "nope"), "item", "nope"),
        (lambda s: s.erase_annotator("p", "nobody"), "annotator", "nobody"),
        (lambda s: s.retract("p", 1), "seq", 1),
    ],
)
def test_errors_name_field_value_and_remedy(store, act, field, value):
    add_question(store)
    with pytest.raises(InputError) as caught:
        act(store)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert caught.value.remedy.endswith(".")


def test_an_unknown_project_is_told_the_known_ones(store):
    add_question(store)
    add_question(store, project="q")
    with pytest.raises(InputError, match="It holds p, q"):
        store.items("nope")


def test_urls_that_lead_nowhere(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    for url, error in (
        ("runs/annotations.db", InputError),
        ("nosuch://host/name", InputError),
        (f"sqlite:///{blocked}/under/it.db", StorageError),
        (f"sqlite:///{tmp_path}", StorageError),
    ):
        with pytest.raises(error) as caught:
            Store.open(url)
        assert caught.value.field == "store.url"
    with pytest.raises(InputError, match="there is no store"):
        Store.open(build_store_url(tmp_path), create_if_missing=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # a reader's typo makes no file


def test_one_process_at_a_time_serves_a_store(store, store_url):
    add_question(store)
    with Store.open(store_url) as other_store:
        with store.serve_exclusively():
            with pytest.raises(InputError, match="another process serves it"), other_store.serve_exclusively():
                pass
            add_question(other_store, "run/1")  # other processes may still read and write
        with other_store.serve_exclusively():
            pass


def test_a_password_is_not_shown():
    with pytest.raises(InputError) as caught:
        Store.open("nosuch://user:hunter2@host/name")
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "annotations.db"
    path.write_bytes(b"just a text file, long enough to have a header" * 40)
    before = path.read_bytes()
    with pytest.raises(CorruptFile, match="not a SQLite database"):
        Store.open(build_store_url(tmp_path))
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "annotations.db") as connection:
        connection.execute("CREATE TABLE bookmarks (id INTEGER)")
    connection.close()
    with pytest.raises(InputError, match=r"another program.*bookmarks"):
        Store.open(build_store_url(tmp_path))


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_another_schema_version_is_refused(store, store_url, version):
    tamper(store, f"UPDATE align_store SET schema_version = {version}")
    with pytest.raises(InputError) as error:
        Store.open(store_url)
    assert (error.value.field, error.value.value) == ("store.url", store.masked_url)
    for part in (f"schema_version {version},", f"reads {SCHEMA_VERSION}", "stage.action=export", "stage=sample"):
        assert part in str(error.value)
    with store.reading() as connection:
        assert connection.exec_driver_sql("SELECT schema_version FROM align_store").scalar() == version


def test_sqlite_is_durable_and_forgets(tmp_path):
    pragmas = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}
    with Store.open(build_store_url(tmp_path)) as store, store.reading() as connection:
        assert {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas} == pragmas
