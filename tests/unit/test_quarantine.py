"""Quarantine of annotators: their votes stay and do not count, their items are asked again, and release undoes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_store import add_question, query_rows, record_ranking
from assignment_queues import judge

from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.leases import find_contested_items
from align.annotate.exchange.exporting import export_votes
from align.annotate.figures.project import compute_figures
from align.annotate.store import Store
from align.annotate.store.integrity import correct_counters
from align.annotate.store.preference_pairs import load_counted_rankings, load_training_rankings
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
    assert load_counted_rankings(store, "p") == []
    with pytest.raises(InputError, match="none of its rankings counts: 6 by annotators in quarantine"):
        load_training_rankings(store, "p")


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


def test_an_annotator_in_quarantine_gets_no_items_and_blocks_none(store: Store) -> None:
    for k in range(3):
        add_question(store, f"new/{k}")
    queue = AssignmentQueue(store, "p")
    held_task = queue.take("bob")
    assert held_task is not None
    quarantine_annotator(store, "p", get_pseudonym(store, "bob"))
    assert queue.take("bob") is None
    assert queue.explain_idle("bob") == "done"
    items = set()
    while (task := queue.take("cleo")) is not None:
        items.add(task.item.id)
        judge(queue, "cleo", task)
    assert held_task.item.id in items
    add_question(store, "new/3")
    assert queue.take("bob") is None
    release_annotator(store, "p", get_pseudonym(store, "bob"))
    assert queue.take("bob") is not None


def test_an_annotator_in_quarantine_takes_votes_back_and_gets_no_item_again(store: Store) -> None:
    item = add_question(store, "new/0")
    queue = AssignmentQueue(store, "p")
    task = queue.take("bob")
    assert task is not None
    seq, _ = judge(queue, "bob", task)
    quarantine_annotator(store, "p", get_pseudonym(store, "bob"))
    assert queue.undo("bob", seq).item.id == item
    assert not queue.renew("bob", task.token)
    assert queue.take("bob") is None
    cleos_task = queue.take("cleo")
    assert cleos_task is not None
    assert cleos_task.item.id == item
    judge(queue, "bob", task, key="again")
    assert sorted(list_judged(store)) == [0, 1, 1, 1]


def test_contested_items_leave_out_votes_and_reviews_in_quarantine(store: Store) -> None:
    item = add_question(store, "run/0")
    record_ranking(store, item, "2>1>0", "eve")
    pseudonyms = {name: get_pseudonym(store, name) for name in ("ann", "bob", "eve")}

    def list_contested() -> list[str]:
        with store.reading() as connection:
            return find_contested_items(connection, "p")

    assert list_contested() == [item]
    quarantine_annotator(store, "p", pseudonyms["eve"])
    assert list_contested() == []
    release_annotator(store, "p", pseudonyms["eve"])
    queue = AssignmentQueue(store, "p")
    task = queue.take_review("dan")
    assert task is not None
    judge(queue, "dan", task)
    assert list_contested() == []
    quarantine_annotator(store, "p", get_pseudonym(store, "dan"))
    assert list_contested() == [item]
    other_task = AssignmentQueue(store, "p").take_review("fay")
    assert other_task is not None
    assert other_task.item.id == item


def test_figures_of_a_project_leave_out_votes_in_quarantine(store: Store) -> None:
    record_ranking(store, add_question(store, "run/0"), "2>1>0", "eve")
    disagreeing = compute_figures(store, "p")["agreement"]["raw"]
    assert disagreeing["value"] < 1
    quarantine_annotator(store, "p", get_pseudonym(store, "eve"))
    figures = compute_figures(store, "p")
    assert figures["agreement"]["raw"]["value"] == 1
    assert [person["quarantined"] for person in figures["people"]] == [False, False, True]


def test_an_annotator_without_votes_can_be_put_into_quarantine(store: Store) -> None:
    queue = AssignmentQueue(store, "p")
    add_question(store, "new/0")
    assert queue.take("dan") is not None
    quarantine_annotator(store, "p", get_pseudonym(store, "dan"))
    assert queue.take("dan") is None


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
