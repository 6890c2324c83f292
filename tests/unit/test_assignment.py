"""Who judges what next: leases, votes, undo, drafts, and what holds whatever happens in between."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from annotation_store import ask, said
from assignment_queues import Hands, best_first, cast_vote, counters, judge, queue_of

from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.queue import SteadyClock
from align.annotate.store import AlreadyJudged, Candidate, Judgement, Store, configure, publish_guidelines
from align.annotate.store.integrity import recount
from align.annotate.store.tables import leases, work
from align.core.errors import InputError


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


@pytest.fixture
def clock():
    return Hands()


# Leases


def test_an_item_has_one_holder_and_is_the_same_until_it_is_judged(store):
    queue = queue_of(store)
    ann, bob = queue.take("ann"), queue.take("bob")
    assert ann.item.id != bob.item.id
    again = queue.take("ann")
    assert (again.token, again.item.id, again.display_order) == (ann.token, ann.item.id, ann.display_order)
    seq, following = judge(queue, "ann", ann)
    assert {ann.item.id, bob.item.id, following.item.id} == {item.id for item in store.items("p")}
    (vote,) = store.rankings("p")
    assert (vote.seq, vote.item, vote.display_order, vote.source) == (seq, ann.item.id, ann.display_order, "human")
    assert queue.take("cem") is None  # the others are held


def test_every_item_is_judged_as_often_as_was_asked_and_by_different_people(store):
    queue = queue_of(store, items=20, overlap=2, overlap_share=0.5)
    people, busy = ["ann", "bob", "cem"], True
    while busy:
        busy = False
        for who in people:
            if task := queue.take(who):
                judge(queue, who, task)
                busy = True
    votes = store.rankings("p")
    per_item = Counter(vote.item for vote in votes)
    assert set(per_item.values()) == {1, 2}
    assert len({(vote.item, vote.annotator) for vote in votes}) == len(votes) == sum(per_item.values())
    with store.reading() as db:
        assert per_item == {row.item: row.wanted for row in db.execute(work.select())}
    progress = queue.read_progress("ann")
    assert (progress.votes, progress.votes_wanted) == (len(votes), len(votes))


def test_more_overlap_wakes_items_that_were_done(store):
    queue = queue_of(store, items=2)
    for _ in range(2):
        judge(queue, "ann", queue.take("ann"))
    assert queue.take("bob") is None
    configure(store, "p", {"overlap": 2})
    assert queue.take("bob") is not None
    assert queue.take("ann") is None


def test_an_overdue_item_goes_to_somebody_else_and_a_late_vote_is_taken(store, clock):
    queue = queue_of(store, clock, items=1, lease_minutes=10)
    task = queue.take("ann")
    clock.now += 599
    assert queue.take("bob") is None
    clock.now += 2
    other = queue.take("bob")
    assert other.item.id == task.item.id
    assert queue.renew("ann", task.token) is False
    late, _ = judge(queue, "ann", task)
    judge(queue, "bob", other)
    assert [vote.annotator for vote in store.rankings("p")] == [store.pseudonym("p", who) for who in ("ann", "bob")]
    assert counters(store)[task.item.id] == (2, 0)
    assert late


def test_an_overdue_item_that_nobody_asked_for_stays(store, clock):
    queue = queue_of(store, clock, items=1)
    task = queue.take("ann")
    clock.now += 1e6
    assert queue.take("ann").token == task.token
    assert queue.renew("ann", task.token)
    assert queue.take("bob") is None


def test_an_item_that_expired_comes_back_to_whoever_shows_life_while_it_is_free(store, clock):
    queue = queue_of(store, clock, items=2)
    task = queue.take("ann")
    clock.now += 1e6
    other = queue.take("bob")  # expires ann's; takes one of the two, by chance hers
    free = other.item.id != task.item.id
    assert queue.renew("ann", task.token) is free
    assert sorted(counters(store).values()) == ([(0, 1), (0, 1)] if free else [(0, 0), (0, 1)])


def test_a_sign_of_life_keeps_an_item(store, clock):
    queue = queue_of(store, clock, items=1, lease_minutes=10)
    task = queue.take("ann")
    for _ in range(5):
        clock.now += 500
        assert queue.renew("ann", task.token)
        assert queue.take("bob") is None


def test_a_wall_clock_that_jumps_ends_no_lease(store, monkeypatch):
    queue = queue_of(store, SteadyClock(), items=1)
    task = queue.take("ann")
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert queue.take("bob") is None
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert queue.take("bob") is None
    assert queue.take("ann").token == task.token


def test_a_clock_set_back_during_a_restart_makes_no_lease_last(store, clock):
    queue_of(store, clock, items=1, lease_minutes=10).take("ann")
    earlier = Hands()
    earlier.now = 0.0  # the lease ends at 1600 by the old clock
    queue = AssignmentQueue(store, "p", earlier)
    earlier.now = 601
    assert queue.take("bob") is not None


def test_nobody_uses_anothers_lease(store):
    queue = queue_of(store)
    task = queue.take("ann")
    for act in (
        lambda: judge(queue, "bob", task),
        lambda: queue.renew("bob", task.token),
        lambda: queue.save_draft("bob", task.token, {}),
    ):
        with pytest.raises(InputError) as caught:
            act()
        assert caught.value.field == "token"
    seq, _ = judge(queue, "ann", task)
    with pytest.raises(InputError, match="no vote of yours"):
        queue.undo("bob", seq)
    assert len(store.rankings("p")) == 1


def test_a_project_that_pauses_takes_votes_and_gives_nothing_new(store):
    queue = queue_of(store)
    task = queue.take("ann")
    configure(store, "p", state="paused")
    assert queue.take("ann").token == task.token
    _, following = judge(queue, "ann", task)
    assert following is None
    configure(store, "p", state="open")
    assert queue.take("ann") is not None


def test_why_there_is_nothing(store):
    queue = queue_of(store, items=1)
    task = queue.take("ann")
    assert (queue.take("bob"), queue.explain_idle("bob")) == (None, "held")
    judge(queue, "ann", task)
    assert queue.explain_idle("bob") == "done"
    configure(store, "p", {"overlap": 2, "quota": 1})
    assert queue.explain_idle("ann") == "quota"
    configure(store, "p", state="paused")
    assert queue.explain_idle("bob") == "paused"


def test_a_quota_is_an_annotators_own(store):
    queue = queue_of(store, quota=1)
    _, following = judge(queue, "ann", queue.take("ann"))
    assert following is None
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
        store.add_item("p", f"{i}", ask(f"question {i}"), [Candidate("a"), Candidate("b")], priority=p)
        for i, p in enumerate((0.1, 0.9, 0.5))
    ]
    configure(store, "p", {"order": "priority"})
    queue = AssignmentQueue(store, "p")
    assert [queue.take(who).item.id for who in ("ann", "bob", "cem")] == [ids[1], ids[2], ids[0]]


# Votes


def test_a_vote_sent_again_counts_once(store):
    queue = queue_of(store)
    task = queue.take("ann")
    seq, following = judge(queue, "ann", task, "k", rationale="because")
    again, still = judge(queue, "ann", task, "k", rationale="because")
    assert (again, still.token) == (seq, following.token)
    with pytest.raises(InputError, match="another judgement"):
        judge(queue, "ann", task, "k", rationale="no reason")
    assert len(store.rankings("p")) == 1


def test_a_second_tab_cannot_vote_over_the_first(store):
    queue = queue_of(store)
    task = queue.take("ann")
    seq, _ = judge(queue, "ann", task, "tab-1")
    with pytest.raises(AlreadyJudged, match=rf"seq {seq}"):
        judge(queue, "ann", task, "tab-2")
    assert len(store.rankings("p")) == 1


def test_a_vote_that_is_refused_leaves_the_lease(store):
    queue = queue_of(store)
    task = queue.take("ann")
    before = counters(store)
    with pytest.raises(InputError):
        cast_vote(queue, "ann", task, "k", said(task.item.id, "0>1"))
    assert counters(store) == before
    assert queue.take("ann").token == task.token


def test_everything_that_was_said_comes_back(store):
    queue = queue_of(store, attributes=["helpful", "honest"])
    publish_guidelines(store, "p", "# Be fair")
    task = queue.take("ann")
    first, second, third = (candidate.id for candidate in task.item.candidates)
    given = best_first(
        task, strength=2, quality="good", ratings={first: {"helpful": 5, "honest": 4}}, flagged=(third, task.item.id),
        seconds=12.5, rationale="It is kinder.", demonstration="I am well — and you?", source="simulated",
    )  # fmt: skip
    seq, _ = cast_vote(queue, "ann", task, "k", given)
    (vote,) = store.rankings("p")
    expected = replace(
        given,
        display_order=task.display_order,
        source="human",
        guideline_version="1",
        project_version=seq - 2,
        flagged=tuple(sorted(given.flagged)),
    )
    assert {name: getattr(vote, name) for name in Judgement.__dataclass_fields__} == {
        name: getattr(expected, name) for name in Judgement.__dataclass_fields__
    }
    assert (vote.seq, second in vote.tiers[1]) == (seq, True)
    store.verify()


def test_a_skip_leaves_the_item_to_others_and_is_not_asked_again(store):
    queue = queue_of(store, items=1)
    task = queue.take("ann")
    _, following = cast_vote(queue, "ann", task, "k", Judgement(skipped="unsure", rationale="no idea"))
    assert following is None
    (skip,) = store.skips("p")
    assert (skip.skipped, skip.rationale, skip.display_order) == ("unsure", "no idea", task.display_order)
    assert store.rankings("p") == []
    assert queue.take("bob").item.id == task.item.id


# Undo and drafts


def test_undo_gives_the_item_back_with_what_was_said_and_the_order_it_stood_in(store):
    queue = queue_of(store, items=3)
    first = queue.take("ann")
    one, second = judge(queue, "ann", first, strength=3, rationale="why")
    two, third = judge(queue, "ann", second)
    back = queue.undo("ann", two)
    back = queue.undo("ann", one)
    assert (back.token, back.display_order) == (first.token, first.display_order)
    assert (back.draft["strength"], back.draft["rationale"]) == (3, "why")
    assert [tuple(tier) for tier in back.draft["tiers"]] == list(best_first(first).tiers)
    assert store.rankings("p") == []
    assert queue.undo("ann", one).token == first.token  # asked again, because the answer was lost
    assert counters(store) == {item.id: (0, 1) for item in store.items("p")}
    _, following = judge(queue, "ann", back, "new-1")
    assert following.token == second.token
    _, following = judge(queue, "ann", following, "new-2")
    assert following.token == third.token
    assert len(store.rankings("p")) == 2
    store.verify()


def test_a_late_copy_of_a_vote_that_was_taken_back_does_not_bring_it_back(store):
    queue = queue_of(store)
    task = queue.take("ann")
    seq, _ = judge(queue, "ann", task, "k")
    queue.undo("ann", seq)
    again, following = judge(queue, "ann", task, "k")
    assert (again, following.token, store.rankings("p")) == (seq, task.token, [])


def test_a_vote_out_of_sight_can_still_be_taken_back(store):
    queue = queue_of(store, items=2)
    seqs = []
    for _ in range(2):
        seqs.append(judge(queue, "ann", queue.take("ann"))[0])
    assert queue.take("ann") is None
    assert queue.undo("ann", seqs[0]) is not None
    with pytest.raises(InputError, match="no vote of yours"):
        queue.undo("ann", 1)


def test_a_draft_outlives_its_lease(store, clock):
    queue = queue_of(store, clock, items=1)
    task = queue.take("ann")
    queue.save_draft("ann", task.token, {"rationale": "half a sen"})
    assert AssignmentQueue(store, "p", clock).take("ann").draft == {"rationale": "half a sen"}
    clock.now += 1e6
    other = queue.take("bob")
    assert other.draft == {}
    clock.now += 1e6
    assert queue.take("ann").draft == {"rationale": "half a sen"}
    judge(queue, "ann", queue.take("ann"))
    with store.reading() as db:
        assert db.exec_driver_sql("SELECT count(*) FROM drafts").scalar() == 0


# Whatever happens


@pytest.mark.parametrize("seed", range(3))
def test_whatever_people_do_the_counters_are_right_and_nobody_is_asked_twice(store, clock, seed):
    """Some hundred acts at random: takes, votes, skips, undos, signs of life, and time that passes."""
    rng = random.Random(seed)
    queue = queue_of(store, clock, items=12, overlap=2, overlap_share=0.5, lease_minutes=5, repeat_share=0.2)
    held: dict[str, dict] = {who: {} for who in ("ann", "bob", "cem")}
    votes: dict[str, list[int]] = {who: [] for who in held}
    for step in range(150):
        who, act = rng.choice(sorted(held)), rng.choice("tttvvvvsugw")
        mine = list(held[who].values())
        if act == "t" and (task := queue.take(who)):
            held[who][task.token] = task
        elif act in "vs" and mine:
            task = held[who].pop(rng.choice(mine).token)
            judgement = Judgement(skipped="unsure") if act == "s" else best_first(task)
            try:
                votes[who].append(cast_vote(queue, who, task, f"{seed}/{step}", judgement)[0])
            except AlreadyJudged:  # under another lease: this one had run out
                assert any(v.item == task.item.id for v in (*store.rankings("p"), *store.skips("p")))
        elif act == "u" and votes[who]:
            task = queue.undo(who, votes[who].pop(rng.randrange(len(votes[who]))))
            held[who][task.token] = task
        elif act == "g" and mine:
            queue.renew(who, rng.choice(mine).token)
        elif act == "w":
            clock.now += rng.choice((1, 60, 301))

        with store.transaction() as db:
            assert recount(db, "p") == 0, f"after step {step}, {act}"
    standing = [vote for vote in (*store.rankings("p"), *store.skips("p")) if vote.purpose == "work"]
    assert len({(vote.item, vote.annotator) for vote in standing}) == len(standing) > 10
    with store.reading() as db:
        rows = db.execute(leases.select()).all()
    for row in rows:
        twins = [r for r in rows if (r.item, r.annotator, r.purpose) == (row.item, row.annotator, row.purpose)]
        assert sum(r.state in ("open", "judged") for r in twins) <= 1
    store.verify()
