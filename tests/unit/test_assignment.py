"""Assignment of items: leases, votes, undo, drafts, and invariants under random actions."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from annotation_store import build_judgement, build_prompt
from assignment_queues import SettableClock, cast_vote, judge, open_queue, rank_in_order, read_counters

from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.queue import SteadyClock
from align.annotate.store import AlreadyJudged, Candidate, Judgement, Store, configure_project, publish_guidelines
from align.annotate.store.integrity import correct_counters
from align.annotate.store.tables import leases, work
from align.core.errors import InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


@pytest.fixture
def clock():
    return SettableClock()


# Leases


def test_an_item_has_one_holder_and_is_the_same_until_it_is_judged(store):
    queue = open_queue(store)
    ann_task = queue.take("ann")
    bob_task = queue.take("bob")
    assert ann_task.item.id != bob_task.item.id
    same_task = queue.take("ann")
    assert (same_task.token, same_task.item.id, same_task.display_order) == (
        ann_task.token,
        ann_task.item.id,
        ann_task.display_order,
    )
    seq, next_task = judge(queue, "ann", ann_task)
    assert {ann_task.item.id, bob_task.item.id, next_task.item.id} == {item.id for item in store.items("p")}
    (vote,) = store.rankings("p")
    assert (vote.seq, vote.item, vote.display_order, vote.source) == (
        seq,
        ann_task.item.id,
        ann_task.display_order,
        "human",
    )
    assert queue.take("cem") is None  # ann and bob hold the others


def test_every_item_is_judged_as_often_as_was_asked_and_by_different_people(store):
    queue = open_queue(store, items=20, overlap=2, overlap_share=0.5)
    people = ["ann", "bob", "cem"]
    busy = True
    while busy:
        busy = False
        for who in people:
            if task := queue.take(who):
                judge(queue, who, task)
                busy = True
    votes = store.rankings("p")
    votes_per_item = Counter(vote.item for vote in votes)
    assert set(votes_per_item.values()) == {1, 2}
    assert len({(vote.item, vote.annotator) for vote in votes}) == len(votes) == sum(votes_per_item.values())
    with store.reading() as db:
        assert votes_per_item == {row.item: row.wanted for row in db.execute(work.select())}
    progress = queue.read_progress("ann")
    assert (progress.votes, progress.votes_wanted) == (len(votes), len(votes))


def test_more_overlap_wakes_items_that_were_done(store):
    queue = open_queue(store, items=2)
    for _ in range(2):
        judge(queue, "ann", queue.take("ann"))
    assert queue.take("bob") is None
    configure_project(store, "p", {"overlap": 2})
    assert queue.take("bob") is not None
    assert queue.take("ann") is None


def test_an_overdue_item_goes_to_somebody_else_and_a_late_vote_is_taken(store, clock):
    queue = open_queue(store, clock, items=1, lease_minutes=10)
    task = queue.take("ann")
    clock.now += 599
    assert queue.take("bob") is None
    clock.now += 2
    bob_task = queue.take("bob")
    assert bob_task.item.id == task.item.id
    assert queue.renew("ann", task.token) is False
    late_seq, _ = judge(queue, "ann", task)
    judge(queue, "bob", bob_task)
    assert [vote.annotator for vote in store.rankings("p")] == [store.pseudonym("p", who) for who in ("ann", "bob")]
    assert read_counters(store)[task.item.id] == (2, 0)
    assert late_seq


def test_an_overdue_item_that_nobody_asked_for_stays(store, clock):
    queue = open_queue(store, clock, items=1)
    task = queue.take("ann")
    clock.now += 1e6
    assert queue.take("ann").token == task.token
    assert queue.renew("ann", task.token)
    assert queue.take("bob") is None


def test_an_item_that_expired_comes_back_to_whoever_shows_life_while_it_is_free(store, clock):
    queue = open_queue(store, clock, items=2)
    task = queue.take("ann")
    clock.now += 1e6
    bob_task = queue.take("bob")  # expires ann's lease, and takes one of the two items, by chance hers
    is_free = bob_task.item.id != task.item.id
    assert queue.renew("ann", task.token) is is_free
    assert sorted(read_counters(store).values()) == ([(0, 1), (0, 1)] if is_free else [(0, 0), (0, 1)])


def test_a_sign_of_life_keeps_an_item(store, clock):
    queue = open_queue(store, clock, items=1, lease_minutes=10)
    task = queue.take("ann")
    for _ in range(5):
        clock.now += 500
        assert queue.renew("ann", task.token)
        assert queue.take("bob") is None


def test_a_wall_clock_that_jumps_ends_no_lease(store, monkeypatch):
    queue = open_queue(store, SteadyClock(), items=1)
    task = queue.take("ann")
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert queue.take("bob") is None
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert queue.take("bob") is None
    assert queue.take("ann").token == task.token


def test_a_clock_set_back_during_a_restart_makes_no_lease_last(store, clock):
    open_queue(store, clock, items=1, lease_minutes=10).take("ann")
    earlier = SettableClock()
    earlier.now = 0.0  # the lease ends at 1600 by the old clock
    queue = AssignmentQueue(store, "p", earlier)
    earlier.now = 601
    assert queue.take("bob") is not None


def test_nobody_uses_anothers_lease(store):
    queue = open_queue(store)
    task = queue.take("ann")
    for call in (
        lambda: judge(queue, "bob", task),
        lambda: queue.renew("bob", task.token),
        lambda: queue.save_draft("bob", task.token, {}),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.field == "token"
    seq, _ = judge(queue, "ann", task)
    with pytest.raises(InputError, match="no vote of yours"):
        queue.undo("bob", seq)
    assert len(store.rankings("p")) == 1


def test_a_project_that_pauses_takes_votes_and_gives_nothing_new(store):
    queue = open_queue(store)
    task = queue.take("ann")
    configure_project(store, "p", state="paused")
    assert queue.take("ann").token == task.token
    _, next_task = judge(queue, "ann", task)
    assert next_task is None
    configure_project(store, "p", state="open")
    assert queue.take("ann") is not None


def test_why_there_is_nothing(store):
    queue = open_queue(store, items=1)
    task = queue.take("ann")
    assert (queue.take("bob"), queue.explain_idle("bob")) == (None, "held")
    judge(queue, "ann", task)
    assert queue.explain_idle("bob") == "done"
    configure_project(store, "p", {"overlap": 2, "quota": 1})
    assert queue.explain_idle("ann") == "quota"
    configure_project(store, "p", state="paused")
    assert queue.explain_idle("bob") == "paused"


def test_a_quota_is_an_annotators_own(store):
    queue = open_queue(store, quota=1)
    _, next_task = judge(queue, "ann", queue.take("ann"))
    assert next_task is None
    assert queue.take("bob") is not None
    assert (
        queue.read_progress("ann").own_votes,
        queue.read_progress("bob").own_votes,
        queue.read_progress("ann").quota,
    ) == (
        1,
        0,
        1,
    )


def test_the_highest_priority_comes_first_where_the_project_says_so(store):
    ids = [
        store.add_item("p", f"{i}", build_prompt(f"question {i}"), [Candidate("a"), Candidate("b")], priority=p)
        for i, p in enumerate((0.1, 0.9, 0.5))
    ]
    configure_project(store, "p", {"order": "priority"})
    queue = AssignmentQueue(store, "p")
    assert [queue.take(who).item.id for who in ("ann", "bob", "cem")] == [ids[1], ids[2], ids[0]]


# Votes


@pytest.mark.parametrize(
    ("measured", "elapsed", "recorded"),
    [(30.0, 4.04, 4.0), (2.5, 4.0, 2.5), (None, 4.0, None), (30.0, -5.0, 30.0)],
)
def test_a_vote_took_at_most_the_time_since_its_lease(store, clock, measured, elapsed, recorded):
    """A vote that is sent again later has the seconds of the first time."""
    queue = open_queue(store, clock=clock)
    task = queue.take("ann")
    clock.now += elapsed
    judgement = replace(rank_in_order(task), seconds=measured)
    seq, _ = cast_vote(queue, "ann", task, "key", judgement)
    clock.now += 100
    assert cast_vote(queue, "ann", task, "key", judgement)[0] == seq
    assert store.rankings("p")[0].seconds == recorded


def test_a_vote_after_undo_took_at_most_the_time_since_the_undo(store, clock):
    queue = open_queue(store, clock=clock)
    task = queue.take("ann")
    clock.now += 600
    seq, _ = judge(queue, "ann", task, seconds=600)
    task = queue.undo("ann", seq)
    clock.now += 3
    judge(queue, "ann", task, key="again", seconds=600)
    assert [vote.seconds for vote in store.rankings("p")] == [3]


def test_a_vote_sent_again_counts_once(store):
    queue = open_queue(store)
    task = queue.take("ann")
    seq, next_task = judge(queue, "ann", task, "k", rationale="because")
    repeated_seq, repeated_task = judge(queue, "ann", task, "k", rationale="because")
    assert (repeated_seq, repeated_task.token) == (seq, next_task.token)
    with pytest.raises(InputError, match="another judgement"):
        judge(queue, "ann", task, "k", rationale="no reason")
    assert len(store.rankings("p")) == 1


def test_a_second_tab_cannot_vote_over_the_first(store):
    queue = open_queue(store)
    task = queue.take("ann")
    seq, _ = judge(queue, "ann", task, "tab-1")
    with pytest.raises(AlreadyJudged, match=rf"seq {seq}"):
        judge(queue, "ann", task, "tab-2")
    assert len(store.rankings("p")) == 1


def test_a_vote_that_is_refused_leaves_the_lease(store):
    queue = open_queue(store)
    task = queue.take("ann")
    before = read_counters(store)
    with pytest.raises(InputError):
        cast_vote(queue, "ann", task, "k", build_judgement(task.item.id, "0>1"))
    assert read_counters(store) == before
    assert queue.take("ann").token == task.token


def test_everything_that_was_said_comes_back(store, clock):
    queue = open_queue(store, clock=clock, attributes=["helpful", "honest"])
    publish_guidelines(store, "p", "# Be fair")
    task = queue.take("ann")
    clock.now += 20
    first, second, third = (candidate.id for candidate in task.item.candidates)
    judgement = rank_in_order(
        task,
        strength=2,
        quality="good",
        ratings={first: {"helpful": 5, "honest": 4}},
        flagged=(third, task.item.id),
        seconds=12.5,
        rationale="It is kinder.",
        demonstration="I am well — and you?",
        source="simulated",
    )
    seq, _ = cast_vote(queue, "ann", task, "k", judgement)
    (vote,) = store.rankings("p")
    expected = replace(
        judgement,
        display_order=task.display_order,
        source="human",
        guideline_version="1",
        project_version=seq - 2,
        flagged=tuple(sorted(judgement.flagged)),
    )
    assert {name: getattr(vote, name) for name in Judgement.__dataclass_fields__} == {
        name: getattr(expected, name) for name in Judgement.__dataclass_fields__
    }
    assert (vote.seq, second in vote.tiers[1]) == (seq, True)
    store.verify()


def test_a_skip_leaves_the_item_to_others_and_is_not_asked_again(store):
    queue = open_queue(store, items=1)
    task = queue.take("ann")
    _, next_task = cast_vote(queue, "ann", task, "k", Judgement(skipped="unsure", rationale="no idea"))
    assert next_task is None
    (skip,) = store.skips("p")
    assert (skip.skipped, skip.rationale, skip.display_order) == ("unsure", "no idea", task.display_order)
    assert store.rankings("p") == []
    assert queue.take("bob").item.id == task.item.id


# Undo and drafts


def test_undo_gives_the_item_back_with_what_was_said_and_the_order_it_stood_in(store):
    queue = open_queue(store, items=3)
    first_task = queue.take("ann")
    first_seq, second_task = judge(queue, "ann", first_task, strength=3, rationale="why")
    second_seq, third_task = judge(queue, "ann", second_task)
    returned_task = queue.undo("ann", second_seq)
    returned_task = queue.undo("ann", first_seq)
    assert (returned_task.token, returned_task.display_order) == (first_task.token, first_task.display_order)
    assert (returned_task.draft["strength"], returned_task.draft["rationale"]) == (3, "why")
    assert [tuple(tier) for tier in returned_task.draft["tiers"]] == list(rank_in_order(first_task).tiers)
    assert store.rankings("p") == []
    assert queue.undo("ann", first_seq).token == first_task.token  # a repeated undo, because its response was lost
    assert read_counters(store) == {item.id: (0, 1) for item in store.items("p")}
    _, next_task = judge(queue, "ann", returned_task, "new-1")
    assert next_task.token == second_task.token
    _, next_task = judge(queue, "ann", next_task, "new-2")
    assert next_task.token == third_task.token
    assert len(store.rankings("p")) == 2
    store.verify()


def test_a_late_copy_of_a_vote_that_was_taken_back_does_not_bring_it_back(store):
    queue = open_queue(store)
    task = queue.take("ann")
    seq, _ = judge(queue, "ann", task, "k")
    queue.undo("ann", seq)
    repeated_seq, next_task = judge(queue, "ann", task, "k")
    assert (repeated_seq, next_task.token, store.rankings("p")) == (seq, task.token, [])


def test_a_vote_out_of_sight_can_still_be_taken_back(store):
    queue = open_queue(store, items=2)
    seqs = []
    for _ in range(2):
        seqs.append(judge(queue, "ann", queue.take("ann"))[0])
    assert queue.take("ann") is None
    assert queue.undo("ann", seqs[0]) is not None
    with pytest.raises(InputError, match="no vote of yours"):
        queue.undo("ann", 1)


def test_a_draft_outlives_its_lease(store, clock):
    queue = open_queue(store, clock, items=1)
    task = queue.take("ann")
    queue.save_draft("ann", task.token, {"rationale": "half a sen"})
    assert AssignmentQueue(store, "p", clock).take("ann").draft == {"rationale": "half a sen"}
    clock.now += 1e6
    bob_task = queue.take("bob")
    assert bob_task.draft == {}
    clock.now += 1e6
    assert queue.take("ann").draft == {"rationale": "half a sen"}
    judge(queue, "ann", queue.take("ann"))
    with store.reading() as db:
        assert db.exec_driver_sql("SELECT count(*) FROM drafts").scalar() == 0


# Random actions


@pytest.mark.parametrize("seed", range(3))
def test_whatever_people_do_the_counters_are_right_and_nobody_is_asked_twice(store, clock, seed):
    """Random actions: takes, votes, skips, undos, renewals, and time that passes."""
    rng = random.Random(seed)
    queue = open_queue(store, clock, items=12, overlap=2, overlap_share=0.5, lease_minutes=5, repeat_share=0.2)
    open_tasks: dict[str, dict] = {who: {} for who in ("ann", "bob", "cem")}
    votes: dict[str, list[int]] = {who: [] for who in open_tasks}
    for step in range(150):
        who = rng.choice(sorted(open_tasks))
        action = rng.choice("tttvvvvsugw")
        tasks = list(open_tasks[who].values())
        if action == "t" and (task := queue.take(who)):
            open_tasks[who][task.token] = task
        elif action in "vs" and tasks:
            task = open_tasks[who].pop(rng.choice(tasks).token)
            judgement = Judgement(skipped="unsure") if action == "s" else rank_in_order(task)
            try:
                votes[who].append(cast_vote(queue, who, task, f"{seed}/{step}", judgement)[0])
            except AlreadyJudged:  # under another lease: this lease had expired
                assert any(v.item == task.item.id for v in (*store.rankings("p"), *store.skips("p")))
        elif action == "u" and votes[who]:
            task = queue.undo(who, votes[who].pop(rng.randrange(len(votes[who]))))
            open_tasks[who][task.token] = task
        elif action == "g" and tasks:
            queue.renew(who, rng.choice(tasks).token)
        elif action == "w":
            clock.now += rng.choice((1, 60, 301))

        with store.transaction() as db:
            assert correct_counters(db, "p") == 0, f"after step {step}, {action}"
    valid_votes = [vote for vote in (*store.rankings("p"), *store.skips("p")) if vote.purpose == "work"]
    assert len({(vote.item, vote.annotator) for vote in valid_votes}) == len(valid_votes) > 10
    with store.reading() as db:
        rows = db.execute(leases.select()).all()
    for row in rows:
        leases_of_item = [r for r in rows if (r.item, r.annotator, r.purpose) == (row.item, row.annotator, row.purpose)]
        assert sum(r.state in ("open", "judged") for r in leases_of_item) <= 1
    store.verify()
