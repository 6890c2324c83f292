"""Gold items, repeats, votes that the ledger refuses, and the order of answers on the screen."""

from collections import Counter

import pytest
from annotation_store import add_question, build_judgement, build_prompt
from assignment_queues import cast_vote, judge, open_queue
from sqlalchemy.event import listen

from align.annotate.assignment import REPEAT_AFTER
from align.annotate.assignment.leases import counterbalance_order, is_drawn
from align.annotate.store import Candidate, Store, configure_project
from align.annotate.store.preference_pairs import load_preferences
from align.annotate.store.vote_selection import VoteSelection
from align.core.errors import InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


# Gold and repeats


def test_gold_is_asked_of_everyone_once_and_trained_on_by_nobody(store):
    gold = store.add_item("p", "gold", build_prompt(), [Candidate("good"), Candidate("bad")], expected=[[0], [1]])
    queue = open_queue(store, items=3, gold_share=1.0)
    for who in ("ann", "bob"):
        task = queue.take(who)
        assert task.item.id == gold
        _, following = cast_vote(queue, who, task, who, build_judgement(gold, "0>1"))
        assert following.item.id != gold
    assert {vote.purpose for vote in store.rankings("p")} == {"gold"}
    with pytest.raises(InputError, match="none of its items has been ranked"):
        load_preferences(store, "p")
    judge(queue, "ann", queue.take("ann"))
    assert {pref.group_id for pref in load_preferences(store, "p")}.isdisjoint({gold})


def test_a_repeat_comes_later_and_turned_round_and_once(store):
    queue = open_queue(store, items=REPEAT_AFTER + 3, repeat_share=1.0)
    tasks = []
    task = queue.take("ann")
    while task is not None:
        tasks.append(task)
        _, task = judge(queue, "ann", task)
    first = {}
    for place, task in enumerate(tasks):
        if task.item.id in first:
            first_place, first_order = first.pop(task.item.id)
            assert place - first_place > REPEAT_AFTER
            assert task.display_order == tuple(reversed(first_order))
        else:
            first[task.item.id] = (place, task.display_order)
    purposes = Counter(vote.purpose for vote in store.rankings("p"))
    assert purposes["work"] == REPEAT_AFTER + 3
    assert purposes["repeat"] >= 2
    assert len(load_preferences(store, "p")) == 3 * (REPEAT_AFTER + 3)  # repeats are not training data
    store.verify()


def test_a_repeat_is_judged_afresh_and_far_from_the_last_vote(store):
    queue = open_queue(store, items=REPEAT_AFTER + 4, repeat_share=1.0)
    first = queue.take("ann")
    seq, task = judge(queue, "ann", first, rationale="first time")
    for _ in range(REPEAT_AFTER - 1):
        _, task = judge(queue, "ann", task)
    judge(queue, "ann", queue.undo("ann", seq), "anew", rationale="second time")
    item_ids = []
    while task is not None and task.item.id != first.item.id:
        item_ids.append(task.item.id)
        assert task.draft == {}
        _, task = judge(queue, "ann", task)
    assert task is None or len(item_ids) >= REPEAT_AFTER
    assert task is None or task.draft == {}


def test_undoing_what_is_being_repeated_takes_the_repeat_back(store):
    queue = open_queue(store, items=REPEAT_AFTER + 3, repeat_share=1.0)
    task = queue.take("ann")
    seqs = {}
    while task.item.id not in seqs:
        seqs[task.item.id], task = judge(queue, "ann", task)
    reopened = queue.undo("ann", seqs[task.item.id])
    assert reopened.item.id == task.item.id
    assert reopened.token != task.token
    _, following = judge(queue, "ann", reopened, "anew")
    assert following is not None
    assert following.item.id != reopened.item.id
    store.verify()


def test_a_first_vote_can_be_made_again_while_its_repeat_stands(store):
    queue = open_queue(store, items=REPEAT_AFTER + 1, repeat_share=1.0)
    task = queue.take("ann")
    votes = []
    while task is not None:
        seq, following = judge(queue, "ann", task)
        votes.append((seq, task))
        task = following
    repeat = next(vote for vote in store.rankings("p") if vote.purpose == "repeat")
    seq, task = next((seq, task) for seq, task in votes if task.item.id == repeat.item)
    judge(queue, "ann", queue.undo("ann", seq), "again")
    assert {v.purpose for v in store.rankings("p") if v.item == repeat.item} == {"work", "repeat"}


def test_what_a_gold_item_is_said_to_be_is_never_trained_on(store):
    gold = store.add_item("p", "gold", build_prompt(), [Candidate("good"), Candidate("bad")], expected=[[0], [1]])
    store.record("p", gold, build_judgement(gold, "0>1", source="simulated"), annotator="bot", key="k")
    store.record(
        "p",
        add_question(store),
        build_judgement(add_question(store), "0>1>2", source="simulated"),
        annotator="bot",
        key="l",
    )
    assert {pref.group_id for pref in load_preferences(store, "p", VoteSelection(allow_simulated=True))} == {
        add_question(store)
    }
    assert {vote.purpose for vote in store.rankings("p") if vote.item == gold} == {"gold"}
    assert store.record("p", gold, build_judgement(gold, "0>1", source="simulated"), annotator="bot", key="k")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"skipped": "my name is Ann"}, "skipped"),
        ({"ratings": {"ID": {"nope": 3}}}, "ratings"),
        ({"ratings": {"ID": {"helpful": 9}}}, "ratings.helpful"),
    ],
)
def test_the_ledger_takes_nothing_that_cannot_be_read_back(store, more, field):
    item = add_question(store)
    configure_project(store, "p", {"attributes": ["helpful"]})
    if "ID" in more.get("ratings", {}):
        more = {"ratings": {f"{item}-0": more["ratings"]["ID"]}}
    head = store.head()
    with pytest.raises(InputError) as caught:
        store.record("p", item, build_judgement(item, "0>1>2", **more), annotator="ann", key="k")
    assert caught.value.field == field
    assert store.head() == head


# The order on the screen


@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_every_position_stands_equally_often_in_every_place(k):
    ids = [str(i) for i in range(k)]
    for block in range(5):
        orders = [counterbalance_order(ids, "ann", block * k + i) for i in range(k)]
        assert all(sorted(order) == ids for order in orders)
        for place in range(k):
            assert {order[place] for order in orders} == set(ids)
    assert counterbalance_order(ids, "ann", 3) == counterbalance_order(ids, "ann", 3)


def test_two_annotators_see_different_orders():
    orders = [[counterbalance_order("ab", who, turn) for turn in range(40)] for who in ("ann", "bob")]
    assert orders[0] != orders[1]
    assert 8 <= sum(a == b for a, b in zip(*orders, strict=True)) <= 32


def test_a_chance_befalls_its_share():
    hits = sum(is_drawn(0.2, f"who{n % 7}", n, "gold") for n in range(4000))
    assert hits == pytest.approx(800, abs=80)
    assert not any(is_drawn(0.0, "ann", n, "gold") for n in range(100))
    assert all(is_drawn(1.0, "ann", n, "gold") for n in range(100))


def record_queries(db) -> list:
    queries: list = []
    listen(
        db, "before_cursor_execute", lambda connection, cursor, text, parameters, *_: queries.append((text, parameters))
    )
    return queries


def test_the_next_item_is_found_without_looking_at_the_others(tmp_path):
    """SQLite's query plans for `take` and `vote` scan no table."""
    with Store.open(f"sqlite:///{tmp_path / 'annotations.db'}") as store:
        for order in ("random", "priority"):
            queue = open_queue(store, items=5, order=order, overlap=2, gold_share=1.0, repeat_share=1.0)
            with store.transaction() as db:
                queries = record_queries(db)
                judge(queue, order, queue.take(order))
                selects = [query for query in queries if query[0].startswith("SELECT")]
                plans = [
                    (text, row[-1])
                    for text, parameters in selects
                    for row in db.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters).all()
                ]
            assert len(selects) > 10
            for text, step in plans:
                newest = "ORDER BY ledger.seq DESC" in text  # along the primary key, and no farther than one row
                assert newest or not step.startswith("SCAN"), f"{step}: {text}"
                assert "TEMP B-TREE" not in step or "FROM work" not in text, f"{step}: {text}"
