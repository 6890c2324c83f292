"""Items that annotators disagree on, and reviews: a reviewer's vote replaces theirs in training."""

from __future__ import annotations

import pytest
from annotation_store import record_ranking
from assignment_queues import judge, open_queue, rank_in_order, read_counters

from align.annotate.assignment.leases import find_contested_items
from align.annotate.figures import compute_figures
from align.annotate.store import AlreadyJudged, Store
from align.annotate.store.preference_pairs import load_human_verdicts, load_preferences, load_training_rankings
from align.core.errors import InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


def find_unsettled(store):
    with store.reading() as db:
        return find_contested_items(db, "p")


@pytest.fixture
def queue(store):
    """Queue of three items by two annotators, who contradict each other on one, three and no pairs of answers."""
    queue = open_queue(store, overlap=2)
    first, second, third = (item.id for item in store.items("p"))
    for annotator, orders in {"ann": ("0>1>2", "0>1>2", "0>1>2"), "bob": ("1>0>2", "2>1>0", "01>2")}.items():
        for item, order in zip((first, second, third), orders, strict=True):
            record_ranking(store, item, order, annotator=annotator)
    return queue


def test_the_most_contradicted_comes_first_and_a_tie_contradicts_nobody(store, queue):
    first, second, _ = (item.id for item in store.items("p"))
    assert find_unsettled(store) == [second, first]
    assert [row["item"] for row in compute_figures(store, "p")["disagreements"]] == [second, first]


def test_what_a_reviewer_settles_is_trained_on_in_place_of_what_was_said(store, queue):
    before = read_counters(store)
    task = queue.take_review("eve")
    assert (task.purpose, task.item.id) == ("review", find_unsettled(store)[0])
    seq, next_task = judge(queue, "eve", task)
    assert next_task.item.id == find_unsettled(store)[0] != task.item.id
    assert [row["item"] for row in compute_figures(store, "p")["disagreements"]] == [next_task.item.id]
    votes = [vote for vote in load_training_rankings(store, "p") if vote.item == task.item.id]
    assert [vote.seq for vote in votes] == [seq]
    assert {pair.annotator for pair in load_preferences(store, "p") if pair.group_id == task.item.id} == {
        votes[0].annotator
    }
    assert read_counters(store) == before  # a review does not count as an annotator's judgement
    assert compute_figures(store, "p")["agreement"]["items"] == 3  # the agreement leaves the review out
    store.verify()


def test_a_review_that_is_taken_back_leaves_what_was_said(store, queue):
    task = queue.take_review("eve")
    seq, _ = judge(queue, "eve", task)
    assert queue.undo("eve", seq).token == task.token
    assert len([vote for vote in load_training_rankings(store, "p") if vote.item == task.item.id]) == 2
    second_seq, _ = judge(queue, "eve", task, key="anew")
    assert [vote.seq for vote in load_training_rankings(store, "p") if vote.item == task.item.id] == [second_seq]


def test_two_reviewers_settle_different_items_and_one_who_annotated_may_review(store, queue):
    task_of_eve = queue.take_review("eve")
    task_of_ann = queue.take_review("ann")
    assert task_of_eve.item.id != task_of_ann.item.id
    assert queue.take_review("eve").token == task_of_eve.token
    assert queue.take_review("mallory") is None
    judge(queue, "ann", task_of_ann)
    with pytest.raises(AlreadyJudged):
        store.record(
            "p", task_of_ann.item.id, rank_in_order(task_of_ann, purpose="review"), annotator="ann", key="twice"
        )


def test_a_reviewers_own_work_goes_on_beside_it(store, queue):
    review = queue.take_review("eve")
    assert queue.take("eve") is None  # every item is judged, and a review is not annotation work
    assert queue.take_review("eve").token == review.token


def test_the_newest_of_two_reviews_counts(store, queue):
    item = find_unsettled(store)[0]
    record_ranking(store, item, "0>1>2", annotator="eve", purpose="review")
    last = record_ranking(store, item, "2>1>0", annotator="mallory", purpose="review")
    assert [vote.seq for vote in load_training_rankings(store, "p") if vote.item == item] == [last]


def test_an_item_erased_meanwhile_is_passed_over(store, queue):
    first, second = find_unsettled(store)
    task = queue.take_review("eve")
    assert task.item.id == first
    store.erase_content("p", second)
    _, next_task = judge(queue, "eve", task)
    assert next_task is None


def test_what_a_judge_is_measured_on_has_ties_and_what_a_reviewer_settled(store, queue):
    """Each person's ranking gives a verdict on every two answers: 17 are decided, and one is bob's tie."""
    decided, tied = load_human_verdicts(store, "p")
    assert decided == load_preferences(store, "p")
    assert (len(decided), len(tied)) == (17, 1)
    (pair,) = tied
    third = [item.id for item in store.items("p")][2]
    assert (pair.group_id, {pair.chosen[0].content, pair.rejected[0].content}) == (third, {"fine", "bad"})
    record_ranking(store, third, "0>1>2", annotator="eve", purpose="review")
    assert load_human_verdicts(store, "p")[1] == []


def test_ties_alone_are_something_to_measure_a_judge_on(store):
    open_queue(store, overlap=2)
    (item, *_) = (item.id for item in store.items("p"))
    record_ranking(store, item, "012", annotator="ann")
    decided, tied = load_human_verdicts(store, "p")
    assert (decided, len(tied)) == ([], 3)
    with pytest.raises(InputError, match="only ties"):
        load_preferences(store, "p")
