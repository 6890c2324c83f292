"""A vote is checked against the settings and guidelines that it was made under; the ledger records their versions."""

from __future__ import annotations

import pytest
from annotation_store import add_question, build_judgement, record_ranking
from assignment_queues import judge, open_queue

from align.annotate.assignment.leases import Terms, get_page_mode, read_terms
from align.annotate.store import ProjectSettings, Store, configure_project, publish_guidelines
from align.annotate.store.projects import read_settings_history, read_settings_version
from align.core.errors import InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


def read_current_terms(store: Store, mode: str = "work") -> Terms:
    with store.reading() as db:
        return read_terms(db, "p", mode)


def build_rating(task, **marks):
    return build_judgement(task.item.id, "0>1>2", ratings={task.display_order[0]: marks})


CHANGES = {
    "an attribute is removed": {"attributes": ["honest"]},
    "all are": {"attributes": []},
    "one is renamed": {"attributes": ["helpful!", "honest"]},
    "the scale is shorter": {"scale": 3},
    "and back": {"attributes": ["helpful", "honest"], "scale": 5},
    "something else changes": {"title": "another", "quota": 7, "overlap": 3, "blurred": True},
    "nothing is given out any more": {},
}


@pytest.mark.parametrize("changes", [*([name] for name in CHANGES), list(CHANGES)])
def test_whatever_changes_a_vote_made_before_is_taken_as_it_was_said(store, changes):
    queue = open_queue(store, attributes=["helpful", "honest"])
    publish_guidelines(store, "p", "# One")
    task = queue.take("ann")
    terms = read_current_terms(store)
    for name in changes:
        configure_project(
            store, "p", CHANGES[name], state="closed" if name == "nothing is given out any more" else None
        )
    publish_guidelines(store, "p", "# Two")
    judgement = build_rating(task, helpful=5, honest=1)
    seq, _ = queue.vote("ann", task.token, "k", judgement, terms)
    (vote,) = store.rankings("p")
    assert vote.ratings == {task.display_order[0]: {"helpful": 5, "honest": 1}}
    assert (vote.guideline_version, vote.project_version) == ("1", terms.version)
    assert queue.vote("ann", task.token, "k", judgement, terms)[0] == seq  # sent again
    store.verify()


def test_the_guidelines_named_are_those_that_were_shown_not_those_of_the_moment_of_giving(store):
    publish_guidelines(store, "p", "# One")
    queue = open_queue(store, overlap=2)
    task = queue.take("ann")  # assigned under the first version
    publish_guidelines(store, "p", "# Two")
    # The page was opened again.
    _, following = queue.vote("ann", task.token, "k", build_judgement(task.item.id, "0>1>2"), read_current_terms(store))
    old_terms = Terms(0, "work", 1)
    # Assigned under version 2 to a page that shows version 1.
    queue.vote("ann", following.token, "l", build_judgement(following.item.id, "0>1>2"), old_terms)
    assert [vote.guideline_version for vote in store.rankings("p")] == ["2", "1"]


def test_a_version_is_the_row_that_made_it_and_says_what_was_asked(store):
    assert read_history_of_new_project(store) == (0, [(0, ProjectSettings())])
    configure_project(store, "p", {"attributes": ["a"]})
    first = store.head("p").seq
    record_ranking(store, add_question(store, "x"), "0>1>2")
    configure_project(store, "p", {"scale": 3}, state="paused")
    second = store.head("p").seq
    with store.reading() as db:
        assert read_settings_version(db, "p") == second
        assert read_settings_history(db, "p") == [
            (0, ProjectSettings()),
            (first, ProjectSettings(attributes=("a",))),
            (second, ProjectSettings(attributes=("a",), scale=3)),
        ]


def read_history_of_new_project(store):
    add_question(store)
    with store.reading() as db:
        return read_settings_version(db, "p"), read_settings_history(db, "p")


def test_what_no_version_asked_for_is_refused_and_leaves_the_item(store):
    queue = open_queue(store, attributes=["helpful"])
    old_terms = read_current_terms(store)
    configure_project(store, "p", {"attributes": ["honest"], "scale": 3})
    current_terms = read_current_terms(store)
    task = queue.take("ann")
    rejected_votes = [
        (old_terms, {"honest": 1}),
        (current_terms, {"helpful": 1}),
        (current_terms, {"honest": 5}),
        (old_terms, {"helpful": 6}),
        (Terms(9999, "work", None), {}),
        (Terms(1, "work", None), {}),
        (Terms(current_terms.version, "review", None), {}),
        (Terms(current_terms.version, "work", 1), {}),
        (Terms(-1, "work", None), {}),
    ]
    for terms, marks in rejected_votes:
        with pytest.raises(InputError):
            queue.vote("ann", task.token, "k", build_rating(task, **marks), terms)
    assert store.rankings("p") == []
    queue.vote("ann", task.token, "k", build_rating(task, helpful=5), old_terms)
    assert len(store.rankings("p")) == 1


def test_the_mode_of_a_page_tells_no_gold_item_or_repeat_from_another():
    modes = {purpose: get_page_mode(purpose) for purpose in ("work", "gold", "repeat", "review")}
    assert modes == {"work": "work", "gold": "work", "repeat": "work", "review": "review"}


def test_which_guidelines_somebody_knows_is_what_their_newest_vote_says(store):
    queue = open_queue(store)
    _, following = judge(queue, "ann", queue.take("ann"))
    assert queue.read_known_guidelines("ann") is None  # no guidelines were published yet
    earlier_terms = read_current_terms(store)
    publish_guidelines(store, "p", "# One")
    _, following = queue.vote("ann", following.token, "k", build_judgement(following.item.id, "0>1>2"), earlier_terms)
    assert queue.read_known_guidelines("ann") is None
    seq, _ = judge(queue, "ann", following)
    publish_guidelines(store, "p", "# Two")
    assert queue.read_known_guidelines("ann") == 1
    queue.undo("ann", seq)
    assert queue.read_known_guidelines("ann") == 1
    assert queue.read_known_guidelines("bob") is None
