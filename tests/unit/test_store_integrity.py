"""The annotation store's ledger: complete erasure, detected tampering, and one chain with several writers."""

import hashlib
import json
import multiprocessing
import sqlite3
import threading

import pytest
from annotation_store import (
    add_question,
    build_prompt,
    build_store_url,
    count_table_rows,
    query_rows,
    record_ranking,
    tamper,
)
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError

from align.annotate.store import Candidate, ChainHead, Store
from align.annotate.store.ledger import LedgerEntry
from align.core.chain import GENESIS, hash_link, hash_with_salt
from align.core.errors import CorruptFile, InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


# The ledger's arithmetic


def test_hashes_are_sha256_of_canonical_json_written_out_by_hand():
    assert hash_with_salt("salt", {"b": 1, "a": "ü"}) == hashlib.sha256(b'["salt",{"a":"\\u00fc","b":1}]').hexdigest()
    assert hash_with_salt("salt", "text") != hash_with_salt("other", "text")
    entry = LedgerEntry(1, "p", "ranking", "i", "a1", "k", None, "2026-01-01T00:00:00+00:00", "{}", GENESIS)
    text = f'[1,"p","ranking","i","a1","k",null,"2026-01-01T00:00:00+00:00","{{}}","{"0" * 64}"]'
    assert hash_link(entry.hashed, entry.prev_hash) == hashlib.sha256(text.encode()).hexdigest()


# Erasure


def test_erased_content_is_gone_from_every_table_and_from_the_files(tmp_path):
    with Store.open(build_store_url(tmp_path)) as store:
        erase_and_look(store, tmp_path)


def erase_and_look(store, tmp_path):
    secret = "Xq7-only-here"
    kept_item = add_question(store, "run/0")
    item = store.add_item(
        "p", "run/1", build_prompt(f"{secret} asked"), [Candidate(f"{secret} 1"), Candidate(f"{secret} 2")]
    )
    record_ranking(store, item, "0>1")
    files = list(tmp_path.iterdir())
    assert any(secret.encode() in file.read_bytes() for file in files)
    head = store.head()
    tombstone = store.erase_content("p", item)
    assert not any(secret.encode() in file.read_bytes() for file in tmp_path.iterdir())
    assert count_table_rows(store) == {"prompts": 1, "candidates": 3, "annotators": 1, "ledger": 4}
    assert store.verify(head).seq == tombstone == store.erase_content("p", item)
    assert [i.id for i in store.items("p")] == [kept_item]
    with pytest.raises(InputError, match="erased"):
        record_ranking(store, item, "0>1", annotator="bob")


def test_what_a_reader_kept_in_the_log_goes_with_the_next_write(tmp_path):
    secret = "Xq7-only-here"
    with Store.open(build_store_url(tmp_path)) as store:
        item = store.add_item("p", "run/1", build_prompt(f"{secret} asked"), [Candidate(f"{secret} 1"), Candidate("2")])
        with sqlite3.connect(tmp_path / "annotations.db") as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM prompts").fetchone()
            store._engine.dispose()  # the next connection waits for the reader only briefly
            event.listen(store._engine, "connect", lambda c, _: c.execute("PRAGMA busy_timeout=100"))
            store.erase_content("p", item)
            assert any(secret.encode() in file.read_bytes() for file in tmp_path.iterdir())
        reader.close()
        add_question(store, "later")
        assert not any(secret.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_a_resumed_run_does_not_bring_an_erased_item_back(store):
    item = add_question(store)
    store.erase_content("p", item)
    assert add_question(store) == item
    assert list(store.items("p")) == []


def test_a_digest_cannot_be_confirmed_by_guessing(store):
    # Without the salt, a guess of the erased text could be hashed and compared.
    ids = [store.add_item("p", f"run/{i}", build_prompt(), [Candidate("yes"), Candidate("no")]) for i in range(2)]
    payloads = [json.loads(row[0]) for row in query_rows(store, "SELECT payload FROM ledger ORDER BY seq")]
    assert payloads[0]["prompt"] != payloads[1]["prompt"]
    assert payloads[0]["candidates"][f"{ids[0]}-0"] != payloads[1]["candidates"][f"{ids[1]}-0"]


def test_an_erased_annotator_cannot_be_found_but_the_rankings_stay(store, tmp_path):
    seq = record_ranking(store, add_question(store), "0>1>2")
    store.erase_annotator("p", store.pseudonym("p", "ann@example.org"))
    assert count_table_rows(store)["annotators"] == 0
    assert not any(b"ann@example.org" in file.read_bytes() for file in tmp_path.iterdir() if "shm" not in file.name)
    assert [r.seq for r in store.rankings("p")] == [seq]
    assert store.pseudonym("p", "ann@example.org") is None
    store.verify()


# Tampering


@pytest.fixture
def filled(store):
    """Rows 1-3 add items, 4 and 5 rank the first two."""
    ids = [add_question(store, f"run/{i}") for i in range(3)]
    for item in ids[:2]:
        record_ranking(store, item, "0>1>2")
    assert store.verify() == store.head() == store.verify(store.head("p"))
    return store


@pytest.mark.parametrize(
    ("statement", "bad"),
    [
        ("UPDATE ledger SET payload = replace(payload, '-0', '-9') WHERE seq = 4", 4),
        ("UPDATE ledger SET created_at = '2020-01-01T00:00:00+00:00' WHERE seq = 2", 2),
        ("UPDATE ledger SET annotator = 'a0' WHERE seq = 5", 5),
        ("DELETE FROM ledger WHERE seq = 3", 3),
        ("DELETE FROM ledger WHERE seq = 1", 1),
        ("UPDATE candidates SET text = 'forged' WHERE position = 1 AND text = 'bad'", 1),
        ("UPDATE candidates SET ended = false", 1),
        ("UPDATE prompts SET messages = '[]'", 1),
        ("DELETE FROM candidates WHERE position = 2", 1),
        ("DELETE FROM prompts", 1),
        ("UPDATE annotators SET identity = 'mallory'", 4),
        ("DELETE FROM annotators", 4),
    ],
)
def test_verify_names_the_first_bad_row(filled, statement, bad):
    tamper(filled, statement)
    with pytest.raises(CorruptFile) as caught:
        filled.verify()
    assert (caught.value.field, caught.value.value) == ("ledger.seq", bad)


def test_a_row_that_is_rehashed_still_breaks_the_next_one(filled):
    (row,) = query_rows(filled, f"SELECT {', '.join(LedgerEntry.__slots__)} FROM ledger WHERE seq = 4")
    forged = LedgerEntry(**dict(zip(LedgerEntry.__slots__, row, strict=True)) | {"created_at": "2020", "hash": ""})
    tamper(
        filled,
        f"UPDATE ledger SET created_at = '2020', hash = '{hash_link(forged.hashed, forged.prev_hash)}' WHERE seq = 4",
    )
    with pytest.raises(CorruptFile) as caught:
        filled.verify()
    assert caught.value.value == 5


def test_a_cut_tail_shows_only_against_a_head_noted_before(filled):
    head = filled.head()
    tamper(filled, "DELETE FROM ledger WHERE seq = 5")
    assert filled.verify().seq == 4
    with pytest.raises(CorruptFile, match="cut") as caught:
        filled.verify(expected=head)
    assert caught.value.value == 5
    with pytest.raises(CorruptFile):
        filled.verify(expected=ChainHead(4, "0" * 64))


def test_contents_that_the_ledger_never_heard_of_are_found(filled):
    tamper(filled, "INSERT INTO prompts VALUES ('p', 'stranger', '[]', 's')")
    with pytest.raises(CorruptFile, match="does not mention these contents"):
        filled.verify()


def test_what_was_erased_must_not_come_back(filled):
    item = next(filled.items("p")).id
    tombstone = filled.erase_content("p", item)
    tamper(filled, f"INSERT INTO prompts VALUES ('p', '{item}', '[]', 's')")
    with pytest.raises(CorruptFile) as caught:
        filled.verify()
    assert caught.value.value == tombstone


def test_the_ledger_refuses_a_slip_of_the_hand(filled):
    for statement in ("UPDATE ledger SET project = 'q'", "DELETE FROM ledger"):
        with pytest.raises(DatabaseError, match="append-only"), filled.transaction() as connection:
            connection.exec_driver_sql(statement)


# Several writers


def add_ten_items(url: str, prefix: str, start: int) -> None:
    with Store.open(url) as store:
        for i in range(start, start + 10):
            add_question(store, f"{prefix}/{i}")


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_concurrent_writers_keep_the_chain(store_url, kind):
    # Processes also race to create the tables.
    url = store_url
    spawn = multiprocessing.get_context("spawn").Process
    make = threading.Thread if kind == "threads" else spawn
    workers = [make(target=add_ten_items, args=(url, f"w{n}", 0)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with Store.open(url, create_if_missing=False) as store:
        assert store.verify(store.head()).seq == 30
        assert len({item.id for item in store.items("p")}) == 30


def test_one_store_serves_several_threads_and_a_key_counts_once(store):
    item = add_question(store)
    seqs: list[int] = []
    threads = [
        threading.Thread(target=lambda: seqs.append(record_ranking(store, item, "0>1>2", key="once"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seqs == [2, 2, 2, 2]
    store.verify()
