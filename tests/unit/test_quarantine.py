"""Quarantine of annotators: their votes stay and do not count, their items are asked again, and release undoes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_store import add_question, query_rows, record_ranking

from align.annotate.exchange.exporting import export_votes
from align.annotate.store import Store
from align.annotate.store.integrity import correct_counters
from align.annotate.store.preference_pairs import load_counted_rankings
from align.annotate.store.quarantine import quarantine_annotator, release_annotator
from align.core.errors import InputError


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """A store with three items, which ann and bob have both ranked."""
    with Store.open(store_url) as store:
        for k in range(3):
            for name in ("ann", "bob"):
                record_ranking(store, add_question(store, f"run/{k}"), "0>1>2", name)
        yield store


def list_judged(store: Store) -> list[int]:
    """Return the number of counted votes of each item, after checking that a recount gives the same."""
    with store.transaction() as connection:
        assert correct_counters(connection, "p") == 0
    return [row[0] for row in query_rows(store, "SELECT judged FROM work ORDER BY item")]


def list_seqs(store: Store) -> list[int]:
    return [ranking.seq for ranking in load_counted_rankings(store, "p")]


def get_pseudonym(store: Store, name: str) -> str:
    pseudonym = store.pseudonym("p", name)
    assert pseudonym is not None
    return pseudonym


def test_votes_in_quarantine_stay_and_do_not_count_until_release(store: Store) -> None:
    before = list_seqs(store)
    assert list_judged(store) == [2, 2, 2]
    bob = get_pseudonym(store, "bob")
    quarantine_annotator(store, "p", bob)
    assert list_judged(store) == [1, 1, 1]
    assert {ranking.annotator for ranking in load_counted_rankings(store, "p")} == {get_pseudonym(store, "ann")}
    assert len(store.rankings("p")) == 6
    assert [ranking.seq for ranking in load_counted_rankings(store, "p", through=before[-1])] == before
    release_annotator(store, "p", bob)
    assert list_judged(store) == [2, 2, 2]
    assert list_seqs(store) == before
    store.verify()


def test_an_export_marks_votes_in_quarantine_and_trains_on_none(store: Store, tmp_path: Path) -> None:
    bob = get_pseudonym(store, "bob")
    quarantine_annotator(store, "p", bob)
    assert export_votes(store, "p", tmp_path)["rankings.jsonl"] == 3
    votes = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(vote["annotator"] == bob, vote["quarantined"], vote["trained_on"]) for vote in votes] == [
        (False, False, True),
        (True, True, False),
    ] * 3
    quarantine_annotator(store, "p", get_pseudonym(store, "ann"))
    with pytest.raises(InputError, match="all who voted in it are in quarantine"):
        load_counted_rankings(store, "p")


def test_votes_and_retractions_during_quarantine(store: Store) -> None:
    bob = get_pseudonym(store, "bob")
    quarantine_annotator(store, "p", bob)
    record_ranking(store, add_question(store, "run/9"), "0>1>2", "bob")
    first = next(vote.seq for vote in store.rankings("p") if vote.annotator == bob)
    store.retract("p", first)
    assert sorted(list_judged(store)) == [0, 1, 1, 1]
    release_annotator(store, "p", bob)
    assert sorted(list_judged(store)) == [1, 1, 2, 2]
    quarantine_annotator(store, "p", bob)
    store.erase_annotator("p", bob)
    assert sorted(list_judged(store)) == [0, 1, 1, 1]
    assert len(list_seqs(store)) == 3
    release_annotator(store, "p", bob)
    assert len(list_seqs(store)) == 6
    store.verify()


def test_what_cannot_be_put_into_quarantine_or_released(store: Store) -> None:
    bob = get_pseudonym(store, "bob")
    with pytest.raises(InputError, match="is not in quarantine"):
        release_annotator(store, "p", bob)
    quarantine_annotator(store, "p", bob)
    with pytest.raises(InputError, match="is in quarantine already"):
        quarantine_annotator(store, "p", bob)
    with pytest.raises(InputError, match="knows no such annotator"):
        quarantine_annotator(store, "p", "a000")
    with pytest.raises(InputError, match="no such project"):
        quarantine_annotator(store, "q", bob)
