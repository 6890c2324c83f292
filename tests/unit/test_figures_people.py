"""Figures of annotators: gold, repeats, times, and a table without formulas that a spreadsheet would run."""

from __future__ import annotations

import csv
import io

import pytest
from annotation_store import add_question, build_prompt, record_ranking
from votes import build_vote

from align.annotate.figures import Undefined, build_people_csv
from align.annotate.figures.estimates import NOTHING_COUNTED, compute_share
from align.annotate.figures.people import (
    CEILING_S,
    UNMEASURED,
    compute_gold_accuracy,
    compute_repeat_consistency,
    summarize_annotators,
    to_csv,
)
from align.annotate.figures.project import read_view
from align.annotate.store import Candidate, Judgement, Store

EXPECTED = {"g": (("g-0", "g-2"), ("g-1",)), "h": (("h-0",), ("h-1",)), "t": (("t-0", "t-1"),)}


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


def load_summaries(store) -> dict:
    return {person.identity: person for person in summarize_annotators(read_view(store, "p"))}


def parse_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


# Gold, repeats, ties


def test_gold_accuracy():
    """Answers 0 and 2 are expected above 1. Their own order is not expected."""
    votes = [
        build_vote("g", "2>0>1", purpose="gold"),  # both right
        build_vote("g", "0>1>2", purpose="gold"),  # one of two
        build_vote("g", "012", purpose="gold"),  # a tie orders nothing
        build_vote("h", "0>1", purpose="gold"),
        build_vote("t", "0>1", purpose="gold"),  # its answers are tied: no order is expected
        build_vote("w", "1>0"),
    ]
    assert compute_gold_accuracy(votes, EXPECTED) == (compute_share([2, 1, 0, 1], [2, 2, 2, 1]), 4, 2)
    assert compute_gold_accuracy([], EXPECTED) == (NOTHING_COUNTED, 0, 0)


def test_a_repeat_says_the_same_or_not():
    votes = [
        build_vote("i", "0>1>2"),
        build_vote("i", "0>2>1", purpose="repeat"),  # two of three pairs
        build_vote("j", "0>12"),
        build_vote("j", "0>12", purpose="repeat"),
        build_vote("k", "0>1", purpose="repeat"),  # the first one was taken back
    ]
    assert compute_repeat_consistency(votes) == compute_share([2, 3], [3, 3])
    assert compute_repeat_consistency(votes[:1]) == NOTHING_COUNTED


# From the store


def test_what_a_person_did(store):
    items = [add_question(store, f"run/{n}") for n in range(4)]
    record_ranking(
        store, items[0], "0>12", "ann", seconds=10, display_order=tuple(f"{items[0]}-{k}" for k in (1, 0, 2))
    )
    record_ranking(store, items[1], "0>1>2", "ann", seconds=20, flagged=(items[1],))
    retracted_seq = record_ranking(store, items[2], "0>1>2", "ann", seconds=CEILING_S * 100)
    store.retract("p", retracted_seq)
    store.record("p", items[2], Judgement(skipped="unsure", seconds=6), annotator="ann", key="skip")
    ann = load_summaries(store)["ann"]
    assert (ann.rankings, ann.retracted, ann.flagged, ann.simulated) == (2, 1, 1, False)
    assert ann.skips == {"unsure": 1, "language": 0, "broken": 0, "harmful": 0, "other": 0}
    assert ann.seconds == 15
    assert ann.hours == pytest.approx((10 + 20 + CEILING_S + 6) / 3600)
    assert ann.ties == compute_share([1, 0], [3, 3])
    assert ann.position.share == compute_share([1], [2])
    # "fine" is longer than "bad" and "eh", and "bad" than "eh".
    assert ann.length.share == compute_share([2, 3], [2, 3])
    assert ann.gold == ann.repeats == NOTHING_COUNTED
    assert ann.first <= ann.last


def test_gold_comes_from_the_ledger(store):
    gold = store.add_item("p", "gold", build_prompt(), [Candidate("good"), Candidate("bad")], expected=[[1], [0]])
    record_ranking(store, gold, "1>0", "ann")
    record_ranking(store, gold, "0>1", "bob")
    summaries = load_summaries(store)
    assert (summaries["ann"].gold, summaries["ann"].gold_right) == (compute_share([1], [1]), 1)
    assert (summaries["bob"].gold, summaries["bob"].gold_right) == (compute_share([0], [1]), 0)
    assert summaries["bob"].position.share == NOTHING_COUNTED
    assert summaries["bob"].seconds == UNMEASURED


def test_who_was_erased_keeps_a_row_without_a_name(store):
    item = add_question(store)
    other_item = add_question(store, "run/1")
    record_ranking(store, item, "0>1>2", "ann", seconds=1800)
    record_ranking(store, other_item, "0>1>2", "ann", seconds=30)
    record_ranking(store, item, "0>1>2", "bob")
    pseudonym = store.pseudonym("p", "ann")
    store.erase_annotator("p", pseudonym)
    store.erase_content("p", item)
    ann, bob = summarize_annotators(read_view(store, "p"))
    assert (ann.pseudonym, ann.identity, ann.rankings) == (pseudonym, None, 1)
    assert (bob.identity, bob.rankings, bob.ties) == ("bob", 0, NOTHING_COUNTED)
    assert ann.hours == pytest.approx((CEILING_S + 30) / 3600)  # the time was spent, even though the item is erased


def test_a_project_without_votes_has_no_people(store):
    add_question(store)
    assert summarize_annotators(read_view(store, "p")) == []
    text = build_people_csv(store, "p")
    assert text.count("\r\n") == 1
    assert text.startswith("pseudonym,identity,")


# As CSV


def test_the_table_says_what_the_rows_say(store):
    item = add_question(store)
    record_ranking(store, item, "0>1>2", "ann", seconds=9, display_order=tuple(f"{item}-{k}" for k in range(3)))
    record_ranking(store, item, "0>12", "bot", source="simulated")
    ann, bot = parse_csv(build_people_csv(store, "p"))
    assert (ann["identity"], ann["rankings"], ann["simulated"], ann["skips_unsure"]) == ("ann", "1", "False", "0")
    assert (ann["position"], ann["position_n"], ann["position_log_odds"]) == (
        "1.0",
        "1",
        "undefined (always the same side)",
    )
    low = compute_share([3], [3]).low
    assert float(ann["position_low"]) == pytest.approx(low)
    assert float(ann["hours"]) == pytest.approx(9 / 3600)
    assert (bot["simulated"], bot["position"], bot["position_low"]) == ("True", "undefined (nothing to count)", "")


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_spreadsheet_runs_no_name(store, first):
    name = f'{first}HYPERLINK("http://example.org"),"x'
    record_ranking(store, add_question(store), "0>1>2", name)
    (row,) = parse_csv(build_people_csv(store, "p"))
    assert row["identity"] == f"'{name}"


def test_a_negative_number_stays_a_number(store):
    for n in range(3):
        item = add_question(store, f"run/{n}", texts=("a", "bb"))
        record_ranking(store, item, "0>1" if n else "1>0", "ann")
    (row,) = parse_csv(to_csv(summarize_annotators(read_view(store, "p"))))
    assert float(row["length_log_odds"]) < 0
    assert not isinstance(summarize_annotators(read_view(store, "p"))[0].length.share, Undefined)
