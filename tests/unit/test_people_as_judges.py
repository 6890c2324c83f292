"""People as judges: the choice of pairs, the sides of answers, and verdicts from votes."""

from __future__ import annotations

from collections import Counter

import pytest
from annotation_store import add_question, build_prompt, record_ranking
from assignment_queues import cast_vote, open_queue
from hypothesis import given
from hypothesis import strategies as st
from votes import build_vote

from align.annotate.assignment.leases import rotate_candidates
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import compute_repeat_consistency
from align.annotate.figures.project import read_view
from align.annotate.store import AnnotationItem, Candidate, Judgement, ProjectSettings, Store, configure_project
from align.annotate.store.ledger import read_ledger_head
from align.annotate.store.preference_pairs import load_counted_rankings
from align.annotate.store.projects import compute_overlap, hash_for_overlap
from align.core.chain import GENESIS, ChainHead
from align.core.types import Conversation, Message
from align.evals.judges.judge_verdict import AnswerPair, JudgeVerdict
from align.evals.stats.decisions import DecisionRule
from align.evals.suite.gates import EvalGate, decide_gate
from align.evals.suite.people import (
    PairQuestion,
    choose_items,
    count_votes_to_ask,
    derive_display_key,
    derive_order_key,
    draw_display_orders,
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


def build_pair_question(id: str = "1", first: str = "yes", second: str = "no", **more) -> PairQuestion:
    return PairQuestion(
        more.pop("task", "t"), more.pop("other", "old"), AnswerPair(id, build_prompt(), first, second), **more
    )


def build_item(*texts: str, prompt: Conversation | None = None) -> AnnotationItem:
    return AnnotationItem(
        "i", prompt or build_prompt(), tuple(Candidate(text, id=f"i-{k}") for k, text in enumerate(texts))
    )


# Sides of answers


@given(st.lists(st.sampled_from("abc"), max_size=60), st.binary(max_size=9), st.integers(-1, 1))
def test_sides_are_balanced_within_one_over_all_and_in_each_group(groups, key, ahead):
    sides = draw_display_orders(groups, key, ahead)
    assert abs(ahead + sum(1 if side else -1 for side in sides)) <= 1
    for group in set(groups):
        signs = [1 if side else -1 for side, side_group in zip(sides, groups, strict=True) if side_group == group]
        assert abs(sum(signs)) <= 1
        assert all(abs(sum(signs[:n])) <= 1 for n in range(len(signs)))  # also while people are still voting


def test_sides_are_drawn_with_the_projects_key_and_the_seed():
    keys = [
        derive_display_key(secret, seed, existing_pairs)
        for secret in (b"a", b"b")
        for seed in (1, 2)
        for existing_pairs in (0, 40)
    ]
    assert len({tuple(draw_display_orders("a" * 40, key)) for key in keys}) == len(keys)
    assert draw_display_orders("a" * 40, keys[0]) == draw_display_orders("a" * 40, derive_display_key(b"a", 1, 0))
    assert {draw_display_orders("a", bytes([n]))[0] for n in range(20)} == {True, False}


def test_the_order_is_drawn_with_the_projects_key_and_the_seed():
    questions = [build_pair_question(str(n)) for n in range(40)]
    keys = [derive_order_key(secret, seed) for secret in (b"a", b"b") for seed in (1, 2)]
    orders = {tuple(question.pair.id for question in sorted(questions, key=lambda q: q.draw(key))) for key in keys}
    assert len(orders) == len(keys)
    draws = [build_pair_question(str(n)).draw(keys[0]) for n in range(2000)]
    assert 0 <= min(draws) < 0.01 < 0.99 < max(draws) < 1
    assert sum(draws) / 2000 == pytest.approx(0.5, abs=0.03)


def test_what_was_ahead_before_is_made_up_for():
    assert sum(draw_display_orders("abcdef", b"k", imbalance=-4)) == 5
    assert sum(draw_display_orders("abcdef", b"k", imbalance=6)) == 0


@pytest.mark.parametrize("k", [2, 3, 5])
def test_each_candidate_stands_once_in_each_place(k):
    ids = [str(i) for i in range(k)]
    orders = [rotate_candidates(ids, turn) for turn in range(k)]
    assert orders[0] == tuple(ids)
    assert all({order[place] for order in orders} == set(ids) for place in range(k))


def test_the_second_person_sees_the_pair_turned_round(store):
    queue = open_queue(store, items=4, overlap=2, turned_by_item=True)
    orders_by_item: dict[str, list] = {}
    for person in ("ann", "bob", "cem"):
        task = queue.take(person)
        while task is not None:
            orders_by_item.setdefault(task.item.id, []).append(task.display_order)
            _, task = cast_vote(queue, person, task, f"{person}/{task.token}", build_judgement(task))
    assert len(orders_by_item) == 4
    for id, orders in orders_by_item.items():
        assert orders == [tuple(f"{id}-{k}" for k in "012"), tuple(f"{id}-{k}" for k in "120")]


def test_who_skips_an_item_leaves_its_order_to_the_next(store):
    queue = open_queue(store, items=1, turned_by_item=True)
    task = queue.take("ann")
    assert task is not None
    cast_vote(queue, "ann", task, "k" * 20, build_judgement(task, skipped="unsure"))
    next_task = queue.take("bob")
    assert next_task is not None
    assert next_task.display_order == task.display_order


def build_judgement(task, skipped=""):
    return Judgement(() if skipped else tuple((c.id,) for c in task.item.candidates), skipped=skipped)


# The choice of pairs


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=40), st.integers(1, 100))
def test_so_many_votes_are_wanted_of_so_many_items(numbers, votes):
    items = [f"item {n}" for n in numbers]
    settings = ProjectSettings(**compute_overlap(items, votes))
    wanted_votes = [settings.count_wanted_votes(id) for id in items]
    minimum = max(votes, len(items))
    assert minimum <= sum(wanted_votes) < minimum + max(1, settings.overlap - 1)
    assert all(
        settings.count_wanted_votes(id) == settings.overlap
        for id in items
        if hash_for_overlap(id) < settings.overlap_share
    )


@pytest.mark.parametrize(("votes", "pairs", "expected"), [(None, 10, 12), (None, 1, 2), (None, 34, 41), (7, 10, 7)])
def test_each_pair_has_a_vote_and_a_fifth_a_second_one(votes, pairs, expected):
    assert count_votes_to_ask(votes, pairs) == expected


def test_forty_votes_are_of_thirty_four_pairs_and_six_again():
    questions = {str(i): build_pair_question(str(i)) for i in range(100)}
    chosen_items = choose_items(questions, (), 40, b"three")
    settings = ProjectSettings(**compute_overlap(chosen_items, 40))
    assert (len(chosen_items), Counter(map(settings.count_wanted_votes, chosen_items))) == (34, {1: 28, 2: 6})
    more_items = choose_items(questions, chosen_items, 80, b"three")
    assert more_items[:34] == chosen_items  # more votes begin with the same items
    assert choose_items(questions, chosen_items, 3, b"three") == chosen_items
    assert choose_items(questions, (), 40, b"four") != chosen_items


# The content of an item


def test_an_item_says_nothing_of_who_wrote_what():
    question = build_pair_question(first="good", second="bad\x00", ended=(False, True))
    first, second = question.candidates(True)
    assert (first, second) == (Candidate("good", ended=False), Candidate("bad\ufffd"))
    assert question.candidates(False) == (second, first)
    assert question.key(b"a" * 32) != question.key(b"b" * 32)
    assert not any(word in question.key(b"a" * 32) for word in ("t/", "old", "1/"))
    assert len({build_pair_question(*args).key(b"k" * 32) for args in (("1",), ("2",))}) == 2


def test_the_first_systems_answer_is_known_by_its_text():
    question = build_pair_question(first="good", second="bad\x00")
    assert question.find_first_answer(build_item("bad\ufffd", "good")) == "i-1"
    assert question.find_first_answer(build_item("good", "bad\ufffd")) == "i-0"
    assert question.find_first_answer(build_item("good", "other")) is None


def test_an_item_of_another_prompt_is_another():
    prompt = Conversation((Message("user", "Why\x00?"), Message("assistant", "So.", trained=False)))
    question = PairQuestion("t", "old", AnswerPair("1", prompt, "good", "bad"))
    stored_prompt = Conversation.from_messages(
        [{"role": "user", "content": "Why\ufffd?"}, {"role": "assistant", "content": "So."}], "i"
    )
    assert question.find_first_answer(build_item("bad", "good", prompt=stored_prompt)) == "i-1"
    assert question.find_first_answer(build_item("bad", "good", prompt=stored_prompt.turns(1))) is None
    assert (
        question.find_first_answer(build_item("bad", "good", prompt=Conversation((Message("user", "Why?"),)))) is None
    )


@pytest.mark.parametrize(("first", "second", "alike"), [("a", "a\n", True), ("", " ", True), ("a", "b", False)])
def test_the_same_text_twice_is_no_question(first, second, alike):
    assert build_pair_question(first=first, second=second).is_tie is alike


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
    assert vote_to_verdict(build_vote("i", order, screen=screen), "7", "i-0") == expected
    turned_round = expected._replace(
        verdict=1 - expected.verdict, order={"first": "second", "second": "first"}[expected.order]
    )
    assert vote_to_verdict(build_vote("i", order, screen=screen), "7", "i-1") == turned_round


def test_votes_go_to_their_pair_and_the_same_text_is_a_tie():
    voted_pair = build_pair_question("1")
    same_text = build_pair_question("2", "a", "a")
    unasked_pair = build_pair_question("3", other="older")
    twin_pair = build_pair_question("2", "a", "a", other="twin")
    votes = [build_vote("i", "0>1", "ann"), build_vote("i", "1>0", "bob"), build_vote("gold", "0>1")]
    verdicts = votes_to_verdicts(
        [voted_pair, same_text, unasked_pair, twin_pair], {"i": (voted_pair, "i-0")}, votes, b"key"
    )
    assert verdicts == {
        ("t", "old"): [
            JudgeVerdict("1", "", 1.0, by="ann"),
            JudgeVerdict("1", "", 0.0, by="bob"),
            JudgeVerdict("2", "", 0.5),
        ],
        ("t", "older"): [],
        ("t", "twin"): [JudgeVerdict("2", "", 0.5)],  # these systems have no pair to ask people about
    }


@given(st.integers(0, 30), st.integers(1, 30), st.data())
def test_pairs_of_the_same_text_count_as_the_judged_pairs_stand_for_them(alike, others, data):
    questions = [build_pair_question(f"s{n}", "a", "a") for n in range(alike)] + [
        build_pair_question(f"d{n}") for n in range(others)
    ]
    judged_names = data.draw(st.lists(st.sampled_from([q.name for q in questions if not q.is_tie]), unique=True))
    ties = select_counted_ties(questions, judged_names, b"key")
    assert all(tie.is_tie for tie in ties)
    assert abs(len(ties) - alike * len(judged_names) / others) <= 0.5  # ties have the same share as among all pairs
    assert len(ties) in {0: {0}, others: {alike}}.get(len(judged_names), range(alike + 1))
    fewer_ties = select_counted_ties(questions, judged_names[:-1], b"key")
    assert fewer_ties == ties[: len(fewer_ties)]  # more votes remove no tie


def test_which_pairs_of_the_same_text_count_is_drawn():
    questions = [build_pair_question(f"s{n}", "a", "a") for n in range(20)] + [
        build_pair_question(f"d{n}") for n in range(20)
    ]
    judged_names = [("t", "old", f"d{n}") for n in range(5)]
    counts = Counter(
        q.pair.id for k in range(400) for q in select_counted_ties(questions, judged_names, bytes([k % 256, k // 256]))
    )
    assert len(counts) == 20
    assert all(60 < n < 140 for n in counts.values())  # 100 each, of 400 draws


@pytest.mark.parametrize(("judged", "n", "outcome"), [(0, 0, "undecided"), (5, 10, "undecided"), (100, 200, "pass")])
def test_pairs_of_the_same_text_decide_no_gate_that_nobody_judged(judged, n, outcome):
    questions = [build_pair_question(f"s{k}", "a", "a") for k in range(100)] + [
        build_pair_question(f"d{k}") for k in range(100)
    ]
    questions_by_item = {f"d{k}": (build_pair_question(f"d{k}"), f"d{k}-0") for k in range(100)}
    votes = [build_vote(f"d{k}", "0>1" if k % 2 else "1>0") for k in range(judged)]
    verdicts = votes_to_verdicts(questions, questions_by_item, votes, b"key")
    items = [EvalItem(q.pair.id, q.pair.id, "", q.pair.prompt, None) for q in questions]
    answers = {
        "new": [EvaluatedAnswer("", q.pair.first, None) for q in questions],
        "old": [EvaluatedAnswer("", "", None) for _ in questions],
    }
    gate = EvalGate("safe", "t", "old", DecisionRule("not_worse", margin=0.2, least_n=100))
    decision = decide_gate(gate, [ScoredTask("t", "people", "people", items, answers, {"old": verdicts["t", "old"]})])
    assert (decision.outcome, decision.figure.n) == (outcome, n)


def test_repeats_are_held_against_ones_own_votes():
    votes = [
        build_vote("i", "0>1", "ann"),
        build_vote("i", "1>0", "bob"),
        build_vote("i", "1>0", "bob", purpose="repeat"),
    ]
    assert as_json(compute_repeat_consistency(votes))["value"] == 1.0
    assert (
        as_json(compute_repeat_consistency([*votes, build_vote("i", "1>0", "ann", purpose="repeat")]))["value"] == 0.5
    )


# Votes in the store


def test_settings_and_items_change_no_vote(store):
    add_question(store)
    with store.reading() as db:
        assert read_ledger_head(db, "p", votes_only=True) == ChainHead(0, GENESIS)
    id = add_question(store, "run/1")
    seq = record_ranking(store, id, "0>12")
    configure_project(store, "p", {"overlap": 2})
    add_question(store, "run/2")
    with store.reading() as db:
        head = read_ledger_head(db, "p", votes_only=True)
    assert head.seq == seq
    store.verify(head)
    store.retract("p", seq)
    with store.reading() as db:
        assert read_ledger_head(db, "p", votes_only=True).seq > seq
        assert read_ledger_head(db, "q", votes_only=True) == ChainHead(0, GENESIS)


def test_a_view_up_to_a_row_has_none_behind_it(store):
    id = add_question(store)
    first = record_ranking(store, id, "0>12", "ann")
    record_ranking(store, id, "1>02", "bob")
    assert [vote.seq for vote in read_view(store, "p").through(first).rankings] == [first]
    assert [vote.seq for vote in load_counted_rankings(store, "p", through=first)] == [first]
    assert load_counted_rankings(store, "p", through=0) == []
