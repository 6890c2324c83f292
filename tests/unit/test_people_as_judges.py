"""People as judges: which pairs they are asked about, where the answers stand, and what their votes say."""

from __future__ import annotations

from collections import Counter

import pytest
from annotation_store import add, ask, rank
from assignment_queues import cast_vote, queue_of
from hypothesis import given
from hypothesis import strategies as st
from votes import voted

from align.annotate.assignment.leases import rotate
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import compute_repeat_consistency
from align.annotate.figures.project import read_view
from align.annotate.store import AnnotationItem, Candidate, Judgement, ProjectSettings, Store, configure
from align.annotate.store.ledger import read_head
from align.annotate.store.preference_pairs import load_counted_rankings
from align.annotate.store.projects import compute_overlap, hash_for_overlap
from align.core.chain import GENESIS, ChainHead
from align.core.types import Conversation, Message
from align.evals.judges.judge_verdict import AnswerPair, JudgeVerdict
from align.evals.stats import DecisionRule
from align.evals.suite.gates import EvalGate, decide_gate
from align.evals.suite.people import (
    PairQuestion,
    choose_items,
    count_votes_to_ask,
    derive_order_key,
    derive_sides_key,
    draw_sides,
    select_counted_ties,
    vote_to_verdict,
    votes_to_verdicts,
)
from align.evals.suite.results import EvaluatedAnswer, ScoredTask
from align.evals.suite.tasks import EvalItem


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


def question(id: str = "1", first: str = "yes", second: str = "no", **more) -> PairQuestion:
    return PairQuestion(more.pop("task", "t"), more.pop("other", "old"), AnswerPair(id, ask(), first, second), **more)


def item(*texts: str, prompt: Conversation | None = None) -> AnnotationItem:
    return AnnotationItem("i", prompt or ask(), tuple(Candidate(text, id=f"i-{k}") for k, text in enumerate(texts)))


# Where answers stand


@given(st.lists(st.sampled_from("abc"), max_size=60), st.binary(max_size=9), st.integers(-1, 1))
def test_sides_are_balanced_within_one_over_all_and_in_each_group(groups, key, ahead):
    sides = draw_sides(groups, key, ahead)
    assert abs(ahead + sum(1 if side else -1 for side in sides)) <= 1
    for group in set(groups):
        told = [1 if side else -1 for side, of in zip(sides, groups, strict=True) if of == group]
        assert abs(sum(told)) <= 1
        assert all(abs(sum(told[:n])) <= 1 for n in range(len(told)))  # also while people are at it


def test_sides_are_drawn_with_the_projects_key_and_the_seed():
    keys = [derive_sides_key(secret, seed, there) for secret in (b"a", b"b") for seed in (1, 2) for there in (0, 40)]
    assert len({tuple(draw_sides("a" * 40, key)) for key in keys}) == len(keys)
    assert draw_sides("a" * 40, keys[0]) == draw_sides("a" * 40, derive_sides_key(b"a", 1, 0))
    assert {draw_sides("a", bytes([n]))[0] for n in range(20)} == {True, False}


def test_the_order_is_drawn_with_the_projects_key_and_the_seed():
    asked = [question(str(n)) for n in range(40)]
    keys = [derive_order_key(secret, seed) for secret in (b"a", b"b") for seed in (1, 2)]
    orders = {tuple(one.pair.id for one in sorted(asked, key=lambda q: q.draw(key))) for key in keys}
    assert len(orders) == len(keys)
    draws = [question(str(n)).draw(keys[0]) for n in range(2000)]
    assert 0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=0.03)


def test_what_was_ahead_before_is_made_up_for():
    assert sum(draw_sides("abcdef", b"k", ahead=-4)) == 5
    assert sum(draw_sides("abcdef", b"k", ahead=6)) == 0


@pytest.mark.parametrize("k", [2, 3, 5])
def test_each_candidate_stands_once_in_each_place(k):
    ids = [str(i) for i in range(k)]
    orders = [rotate(ids, turn) for turn in range(k)]
    assert orders[0] == tuple(ids)
    assert all({order[place] for order in orders} == set(ids) for place in range(k))


def test_the_second_person_sees_the_pair_turned_round(store):
    queue = queue_of(store, items=4, overlap=2, turned_by_item=True)
    shown: dict[str, list] = {}
    for who in ("ann", "bob", "cem"):
        task = queue.take(who)
        while task is not None:
            shown.setdefault(task.item.id, []).append(task.display_order)
            _, task = cast_vote(queue, who, task, f"{who}/{task.token}", rank_of(task))
    assert len(shown) == 4
    for id, orders in shown.items():
        assert orders == [tuple(f"{id}-{k}" for k in "012"), tuple(f"{id}-{k}" for k in "120")]


def test_who_skips_an_item_leaves_its_order_to_the_next(store):
    queue = queue_of(store, items=1, turned_by_item=True)
    task = queue.take("ann")
    assert task is not None
    cast_vote(queue, "ann", task, "k" * 20, rank_of(task, skipped="unsure"))
    again = queue.take("bob")
    assert again is not None
    assert again.display_order == task.display_order


def rank_of(task, skipped=""):
    return Judgement(() if skipped else tuple((c.id,) for c in task.item.candidates), skipped=skipped)


# Which pairs


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=40), st.integers(1, 100))
def test_so_many_votes_are_wanted_of_so_many_items(numbers, votes):
    items = [f"item {n}" for n in numbers]
    settings = ProjectSettings(**compute_overlap(items, votes))
    wanted = [settings.count_wanted_votes(id) for id in items]
    least = max(votes, len(items))
    assert least <= sum(wanted) < least + max(1, settings.overlap - 1)
    assert all(
        settings.count_wanted_votes(id) == settings.overlap
        for id in items
        if hash_for_overlap(id) < settings.overlap_share
    )


@pytest.mark.parametrize(("votes", "pairs", "expected"), [(None, 10, 12), (None, 1, 2), (None, 34, 41), (7, 10, 7)])
def test_each_pair_has_a_vote_and_a_fifth_a_second_one(votes, pairs, expected):
    assert count_votes_to_ask(votes, pairs) == expected


def test_forty_votes_are_of_thirty_four_pairs_and_six_again():
    questions = {str(i): question(str(i)) for i in range(100)}
    found = choose_items(questions, (), 40, b"three")
    settings = ProjectSettings(**compute_overlap(found, 40))
    assert (len(found), Counter(map(settings.count_wanted_votes, found))) == (34, {1: 28, 2: 6})
    more = choose_items(questions, found, 80, b"three")
    assert more[:34] == found  # who is asked for more is asked about the same ones first
    assert choose_items(questions, found, 3, b"three") == found
    assert choose_items(questions, (), 40, b"four") != found


# What an item says, and what it does not


def test_an_item_says_nothing_of_who_wrote_what():
    asked = question(first="good", second="bad\x00", ended=(False, True))
    one, other = asked.candidates(True)
    assert (one, other) == (Candidate("good", ended=False), Candidate("bad\ufffd"))
    assert asked.candidates(False) == (other, one)
    assert asked.key(b"a" * 32) != asked.key(b"b" * 32)
    assert not any(word in asked.key(b"a" * 32) for word in ("t/", "old", "1/"))
    assert len({question(*args).key(b"k" * 32) for args in (("1",), ("2",))}) == 2


def test_the_first_systems_answer_is_known_by_its_text():
    asked = question(first="good", second="bad\x00")
    assert asked.find_first_answer(item("bad\ufffd", "good")) == "i-1"
    assert asked.find_first_answer(item("good", "bad\ufffd")) == "i-0"
    assert asked.find_first_answer(item("good", "other")) is None


def test_an_item_of_another_prompt_is_another():
    said = Conversation((Message("user", "Why\x00?"), Message("assistant", "So.", trained=False)))
    asked = PairQuestion("t", "old", AnswerPair("1", said, "good", "bad"))
    kept = Conversation.from_messages(
        [{"role": "user", "content": "Why\ufffd?"}, {"role": "assistant", "content": "So."}], "i"
    )
    assert asked.find_first_answer(item("bad", "good", prompt=kept)) == "i-1"
    assert asked.find_first_answer(item("bad", "good", prompt=kept.turns(1))) is None
    assert asked.find_first_answer(item("bad", "good", prompt=Conversation((Message("user", "Why?"),)))) is None


@pytest.mark.parametrize(("first", "second", "alike"), [("a", "a\n", True), ("", " ", True), ("a", "b", False)])
def test_the_same_text_twice_is_no_question(first, second, alike):
    assert question(first=first, second=second).is_tie is alike


# Votes


@pytest.mark.parametrize(
    ("order", "screen", "expected"),
    [
        ("0>1", "01", JudgeVerdict("7", "first", 1.0, by="ann")),
        ("1>0", "01", JudgeVerdict("7", "first", 0.0, by="ann")),
        ("0>1", "10", JudgeVerdict("7", "second", 1.0, by="ann")),
        ("1>0", "10", JudgeVerdict("7", "second", 0.0, by="ann")),
        ("01", "10", JudgeVerdict("7", "second", 0.5, by="ann")),
    ],
)
def test_a_vote_is_a_verdict_on_systems_and_not_on_places(order, screen, expected):
    assert vote_to_verdict(voted("i", order, screen=screen), "7", "i-0") == expected
    turned_round = expected._replace(
        verdict=1 - expected.verdict, order={"first": "second", "second": "first"}[expected.order]
    )
    assert vote_to_verdict(voted("i", order, screen=screen), "7", "i-1") == turned_round


def test_votes_go_to_their_pair_and_the_same_text_is_a_tie():
    one, same, unasked = question("1"), question("2", "a", "a"), question("3", other="older")
    alone = question("2", "a", "a", other="twin")
    votes = [voted("i", "0>1", "ann"), voted("i", "1>0", "bob"), voted("gold", "0>1")]
    found = votes_to_verdicts([one, same, unasked, alone], {"i": (one, "i-0")}, votes, b"key")
    assert found == {
        ("t", "old"): [
            JudgeVerdict("1", "", 1.0, by="ann"),
            JudgeVerdict("1", "", 0.0, by="bob"),
            JudgeVerdict("2", "", 0.5),
        ],
        ("t", "older"): [],
        ("t", "twin"): [JudgeVerdict("2", "", 0.5)],  # nobody can be asked anything about these systems
    }


@given(st.integers(0, 30), st.integers(1, 30), st.data())
def test_pairs_of_the_same_text_count_as_the_judged_pairs_stand_for_them(alike, others, data):
    questions = [question(f"s{n}", "a", "a") for n in range(alike)] + [question(f"d{n}") for n in range(others)]
    judged = data.draw(st.lists(st.sampled_from([q.name for q in questions if not q.is_tie]), unique=True))
    found = select_counted_ties(questions, judged, b"key")
    assert all(one.is_tie for one in found)
    assert abs(len(found) - alike * len(judged) / others) <= 0.5  # their share is that of all pairs
    assert len(found) in {0: {0}, others: {alike}}.get(len(judged), range(alike + 1))
    fewer = select_counted_ties(questions, judged[:-1], b"key")
    assert fewer == found[: len(fewer)]  # more votes take none away


def test_which_pairs_of_the_same_text_count_is_drawn():
    questions = [question(f"s{n}", "a", "a") for n in range(20)] + [question(f"d{n}") for n in range(20)]
    judged = [("t", "old", f"d{n}") for n in range(5)]
    met = Counter(
        q.pair.id for k in range(400) for q in select_counted_ties(questions, judged, bytes([k % 256, k // 256]))
    )
    assert len(met) == 20
    assert all(60 < n < 140 for n in met.values())  # 100 each, of 400 draws


@pytest.mark.parametrize(("judged", "n", "outcome"), [(0, 0, "undecided"), (5, 10, "undecided"), (100, 200, "pass")])
def test_pairs_of_the_same_text_decide_no_gate_that_nobody_judged(judged, n, outcome):
    questions = [question(f"s{k}", "a", "a") for k in range(100)] + [question(f"d{k}") for k in range(100)]
    asked = {f"d{k}": (question(f"d{k}"), f"d{k}-0") for k in range(100)}
    votes = [voted(f"d{k}", "0>1" if k % 2 else "1>0") for k in range(judged)]
    found = votes_to_verdicts(questions, asked, votes, b"key")
    items = [EvalItem(q.pair.id, q.pair.id, "", q.pair.prompt, None) for q in questions]
    said = {
        "new": [EvaluatedAnswer("", q.pair.first, None) for q in questions],
        "old": [EvaluatedAnswer("", "", None) for _ in questions],
    }
    gate = EvalGate("safe", "t", "old", DecisionRule("not_worse", margin=0.2, least_n=100))
    decided = decide_gate(gate, [ScoredTask("t", "people", "people", items, said, {"old": found["t", "old"]})])
    assert (decided.outcome, decided.figure.n) == (outcome, n)


def test_repeats_are_held_against_ones_own_votes():
    mine = [voted("i", "0>1", "ann"), voted("i", "1>0", "bob"), voted("i", "1>0", "bob", purpose="repeat")]
    assert as_json(compute_repeat_consistency(mine))["value"] == 1.0
    assert as_json(compute_repeat_consistency([*mine, voted("i", "1>0", "ann", purpose="repeat")]))["value"] == 0.5


# What the store has of them


def test_settings_and_items_change_no_vote(store):
    add(store)
    with store.reading() as db:
        assert read_head(db, "p", votes_only=True) == ChainHead(0, GENESIS)
    id = add(store, "run/1")
    seq = rank(store, id, "0>12")
    configure(store, "p", {"overlap": 2})
    add(store, "run/2")
    with store.reading() as db:
        head = read_head(db, "p", votes_only=True)
    assert head.seq == seq
    store.verify(head)
    store.retract("p", seq)
    with store.reading() as db:
        assert read_head(db, "p", votes_only=True).seq > seq
        assert read_head(db, "q", votes_only=True) == ChainHead(0, GENESIS)


def test_a_view_up_to_a_row_has_none_behind_it(store):
    id = add(store)
    first = rank(store, id, "0>12", "ann")
    rank(store, id, "1>02", "bob")
    assert [vote.seq for vote in read_view(store, "p").through(first).rankings] == [first]
    assert [vote.seq for vote in load_counted_rankings(store, "p", through=first)] == [first]
    assert load_counted_rankings(store, "p", through=0) == []
