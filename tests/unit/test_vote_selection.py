"""Whose votes count: chosen and excluded annotators, and a minimum accuracy on gold items."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from annotation_store import add_question, build_prompt, record_ranking

from align.annotate.exchange.exporting import export_votes
from align.annotate.store import Candidate, Judgement, Store
from align.annotate.store.preference_pairs import load_counted_rankings, load_training_rankings
from align.annotate.store.records import SKIP_REASONS
from align.annotate.store.vote_selection import VoteSelection, select_votes
from align.core.errors import InputError


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """A store in which ann is right on both gold items, bob on one of them, and cleo saw none."""
    with Store.open(store_url) as store:
        for k, orders in enumerate(({"ann": "0>1", "bob": "0>1"}, {"ann": "0>1", "bob": "1>0"})):
            answers = [Candidate("good"), Candidate("bad")]
            gold = store.add_item("p", f"gold/{k}", build_prompt(f"gold {k}"), answers, expected=[[0], [1]])
            for name, order in orders.items():
                record_ranking(store, gold, order, name)
        for k in range(2):
            for name in ("ann", "bob", "cleo"):
                record_ranking(store, add_question(store, f"run/{k}"), "0>1>2", name, demonstration=f"by {name}")
        yield store


def list_annotators(store: Store, **settings: Any) -> set[str]:
    """Return the names of the annotators whose rankings a selection counts."""
    names = {store.pseudonym("p", name): name for name in ("ann", "bob", "cleo")}
    rankings = load_counted_rankings(store, "p", VoteSelection(**settings))
    assert all(ranking.purpose == "work" for ranking in rankings)
    return {names[ranking.annotator] for ranking in rankings}


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({}, {"ann", "bob", "cleo"}),
        ({"annotators": ("ann", "cleo")}, {"ann", "cleo"}),
        ({"exclude_annotators": ("ann",)}, {"bob", "cleo"}),
        ({"annotators": ("ann", "bob"), "exclude_annotators": ("ann",)}, {"bob"}),
        ({"min_gold_accuracy": 0.5}, {"ann", "bob"}),
        ({"min_gold_accuracy": 0.51}, {"ann"}),
        ({"min_gold_accuracy": 0.5, "exclude_annotators": ("ann",)}, {"bob"}),
    ],
)
def test_the_selected_annotators_count(store: Store, settings: dict[str, Any], counted: set[str]) -> None:
    assert list_annotators(store, **settings) == counted


def test_a_skipped_gold_item_is_no_wrong_answer(store: Store) -> None:
    answers = [Candidate("good"), Candidate("bad")]
    gold = store.add_item("p", "gold/9", build_prompt("gold 9"), answers, expected=[[0], [1]])
    store.record("p", gold, Judgement((), skipped=SKIP_REASONS[0], purpose="gold"), annotator="ann", key="skip")
    votes = [*store.rankings("p"), *store.skips("p")]
    selected = select_votes(store, "p", votes, VoteSelection(min_gold_accuracy=1.0))
    assert {vote.annotator for vote in selected} == {store.pseudonym("p", "ann")}


def test_pseudonyms_name_annotators_after_their_erasure_too(store: Store) -> None:
    pseudonym = store.pseudonym("p", "bob")
    assert pseudonym is not None
    assert list_annotators(store, exclude_annotators=(pseudonym,)) == {"ann", "cleo"}
    store.erase_annotator("p", pseudonym)
    rankings = load_counted_rankings(store, "p", VoteSelection(annotators=(pseudonym,)))
    assert [ranking.annotator for ranking in rankings] == [pseudonym] * 2
    with pytest.raises(InputError, match="knows no such annotator"):
        list_annotators(store, exclude_annotators=("bob",))


def test_the_name_of_an_annotator_does_not_take_the_place_of_a_pseudonym(store: Store) -> None:
    pseudonym = store.pseudonym("p", "bob")
    assert pseudonym is not None
    record_ranking(store, add_question(store, "run/0"), "0>1>2", pseudonym)
    rankings = load_counted_rankings(store, "p", VoteSelection(annotators=(pseudonym,)))
    assert {ranking.annotator for ranking in rankings} == {pseudonym}


def test_a_review_by_an_excluded_annotator_replaces_nothing(store: Store) -> None:
    record_ranking(store, add_question(store, "run/0"), "2>1>0", "dan", purpose="review")
    assert len(load_counted_rankings(store, "p")) == 3 + 1
    assert len(load_counted_rankings(store, "p", VoteSelection(exclude_annotators=("dan",)))) == 6


@pytest.mark.parametrize(
    ("settings", "field", "problem"),
    [
        ({"annotators": ("eve",)}, "data.annotators", "project p knows no such annotator"),
        ({"exclude_annotators": ("Ann", "bob", "cleo")}, "project", "6 by annotators in data.exclude_annotators"),
        (
            {"min_gold_accuracy": 0.6, "exclude_annotators": ("ann",)},
            "project",
            "2 by annotators under data.min_gold_accuracy=0.6; 2 by annotators without votes on gold items",
        ),
    ],
)
def test_a_selection_without_votes_is_refused(store: Store, settings: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        load_training_rankings(store, "p", VoteSelection(**settings))
    assert caught.value.field == field


def test_an_export_leaves_out_what_training_leaves_out_and_keeps_all_votes(store: Store, tmp_path: Path) -> None:
    for name in ("all", "selected"):
        (tmp_path / name).mkdir()
    rows = export_votes(store, "p", tmp_path / "all")
    selected = export_votes(store, "p", tmp_path / "selected", VoteSelection(exclude_annotators=("cleo",)))
    assert [rows[name] for name in ("rankings.jsonl", "demonstrations.jsonl", "votes.jsonl")] == [6, 6, 10]
    assert [selected[name] for name in ("rankings.jsonl", "demonstrations.jsonl", "votes.jsonl")] == [4, 4, 10]
    votes = [json.loads(line) for line in (tmp_path / "selected" / "votes.jsonl").read_text().splitlines()]
    assert sum(vote["trained_on"] for vote in votes) == 4
