"""Settling an item changes the training data, and drops no vote and no part of one."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from annotation_store import add_question, record_ranking
from pydantic import ValidationError

from align.annotate.assignment import AssignmentQueue
from align.annotate.assignment.leases import read_opinions
from align.annotate.exchange.exporting import export_votes
from align.annotate.store import Candidate, Judgement, Store, configure_project
from align.annotate.store.preference_pairs import load_preferences
from align.annotate.store.records import SKIP_REASONS
from align.annotate.store.vote_selection import VoteSelection
from align.annotate.web.routes import JudgementBody, opinion_to_json

PEOPLE = ("ann", "bob", "cleo")


def load_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def store(store_url):
    with Store.open(store_url) as store:
        yield store


@pytest.fixture
def said(store) -> dict[int, tuple[str, Judgement]]:
    """Votes of every kind and purpose, with and without each part: seq → item and judgement. Half of the items are
    settled; one of them was reviewed twice."""
    configure_project(store, "p", {"attributes": ["helpful"]})
    votes: dict[int, tuple[str, Judgement]] = {}

    def record_vote(item: str, annotator: str, judgement: Judgement) -> int:
        seq = store.record("p", item, judgement, annotator=annotator, key=f"{annotator}/{item}/{judgement.purpose}")
        votes[seq] = item, judgement
        return seq

    parts = list(product((True, False), repeat=4))  # demonstration, remark, harm, ratings
    for number, (has_demonstration, has_remark, is_harmful, has_ratings) in enumerate(parts):
        item = add_question(store, f"run/{number}")
        ids = [f"{item}-{k}" for k in range(3)]
        for place, annotator in enumerate(PEOPLE):
            extras = {
                "demonstration": f"{annotator} would say {number}" if has_demonstration else "",
                "rationale": f"{annotator} because {number}" if has_remark else "",
                "flagged": (ids[place], item) if is_harmful else (),
            }
            if place == 2 and number % 3 == 0:
                record_vote(item, annotator, Judgement(skipped=SKIP_REASONS[number % len(SKIP_REASONS)], **extras))
                continue
            order = ids[place:] + ids[:place]
            ratings = {ids[0]: {"helpful": 1 + place}} if has_ratings else {}
            ranking = {"quality": "good" if number % 2 else "", "seconds": 2.5, "ratings": ratings}
            record_vote(item, annotator, Judgement(tuple((id,) for id in order), **ranking, **extras))
        repeat = Judgement(tuple((id,) for id in ids), purpose="repeat", demonstration="again", flagged=(ids[1],))
        record_vote(item, "ann", repeat)
        if number % 2 == 0:
            for annotator in ("rev", "eve")[: 1 + (number == 4)]:
                review = {"demonstration": f"{annotator} settles {number}", "rationale": "so", "flagged": (ids[2],)}
                record_vote(item, annotator, Judgement(((ids[2],), (ids[0],), (ids[1],)), purpose="review", **review))
    pair = [Candidate("a"), Candidate("b")]
    gold = store.add_item("p", "gold", next(store.items("p")).prompt, pair, expected=[[0], [1]])
    gold_vote = Judgement(((f"{gold}-0",), (f"{gold}-1",)), purpose="gold", demonstration="of gold", flagged=(gold,))
    record_vote(gold, "ann", gold_vote)
    return votes


def test_everything_that_was_said_leaves_with_the_export(store, said, tmp_path):
    export_votes(store, "p", tmp_path)
    rows = {row["vote"]: row for row in load_rows(tmp_path / "votes.jsonl")}
    assert rows.keys() == said.keys()
    for seq, (item, judgement) in said.items():
        row = rows[seq]
        flagged = {answer["id"] for answer in row["candidates"] if answer["flagged"]}
        assert flagged | ({item} if row["prompt_flagged"] else set()) == set(judgement.flagged)
        ratings = {answer["id"]: answer["ratings"] for answer in row["candidates"] if answer["ratings"]}
        assert ratings == judgement.ratings
        assert [tuple(tier) for tier in row["tiers"]] == list(judgement.tiers)
        for name in ("purpose", "skipped", "quality", "strength", "seconds", "rationale", "demonstration"):
            assert row[name] == getattr(judgement, name)
    demonstrations = Counter(row["messages"][-1]["content"] for row in load_rows(tmp_path / "demonstrations.jsonl"))
    assert demonstrations == Counter(
        judgement.demonstration for _, judgement in said.values() if judgement.demonstration
    )


def test_what_is_trained_on_is_the_reviews_as_it_was(store, said, tmp_path):
    export_votes(store, "p", tmp_path)
    review_votes = {item: seq for seq, (item, judgement) in said.items() if judgement.purpose == "review"}  # the newest
    work_votes = {seq for seq, (_, judgement) in said.items() if judgement.purpose == "work" and judgement.tiers}
    expected_votes = {seq for seq in work_votes if said[seq][0] not in review_votes} | set(review_votes.values())
    for name in ("rankings", "preferences", "implicit"):
        assert {row["vote"] for row in load_rows(tmp_path / f"{name}.jsonl")} == expected_votes
    assert {row["vote"] for row in load_rows(tmp_path / "votes.jsonl") if row["trained_on"]} == expected_votes
    assert {int(pair.id.split(":")[0]) for pair in load_preferences(store, "p")} == expected_votes


def test_what_was_taken_back_and_what_was_simulated_stay(store, tmp_path):
    kept_item, retracted_item, simulated_item = (add_question(store, f"run/{number}") for number in range(3))
    record_ranking(store, kept_item, "0>1>2")
    store.retract("p", record_ranking(store, retracted_item, "0>1>2", demonstration="taken back"))
    record_ranking(store, simulated_item, "0>1>2", annotator="machine", source="simulated", demonstration="simulated")
    record_ranking(store, simulated_item, "2>1>0", annotator="rev", purpose="review")
    export_votes(store, "p", tmp_path)
    assert {row["item"] for row in load_rows(tmp_path / "votes.jsonl")} == {kept_item, simulated_item}
    assert load_rows(tmp_path / "demonstrations.jsonl") == []
    (tmp_path / "all").mkdir()
    export_votes(store, "p", tmp_path / "all", VoteSelection(allow_simulated=True))
    assert len(load_rows(tmp_path / "all" / "demonstrations.jsonl")) == 1


def test_whoever_settles_an_item_reads_all_that_was_said(store):
    configure_project(store, "p", {"overlap": 3, "attributes": ["helpful"]})
    item = add_question(store)
    record_ranking(store, item, "0>1>2", annotator="ann", quality="good", ratings={f"{item}-1": {"helpful": 4}})
    record_ranking(
        store, item, "2>1>0", annotator="bob", flagged=(f"{item}-0", item), demonstration="mine", rationale="why"
    )
    skip = Judgement(skipped="unsure", rationale="hard", demonstration="hers")
    store.record("p", item, skip, annotator="cleo", key="cleo")
    task = AssignmentQueue(store, "p").take_review("rev")
    with store.reading() as db:
        first, second, third = (opinion_to_json(task, vote) for vote in read_opinions(db, "p", item))
    place = {id: str(index) for index, id in enumerate(task.display_order)}
    assert (first["quality"], first["ratings"]) == ("good", {place[f"{item}-1"]: {"helpful": 4}})
    assert set(second["flagged"]) == {int(place[f"{item}-0"]), -1}
    assert ("mine" in second["demonstration"]["html"], "why" in second["rationale"]["html"]) == (True, True)
    assert (third["skipped"], third["tiers"]) == ("unsure", [])
    assert ("hers" in third["demonstration"]["html"], "hard" in third["rationale"]["html"]) == (True, True)


@pytest.mark.parametrize(
    "said",
    [
        {"strength": 4},
        {"strength": True},
        {"strength": "x"},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": -1},
        {"quality": "meh"},
        {"source": "simulated"},
        {"purpose": "gold"},
        {"ratings": {"0": {"helpful": 1.5}}},
        {"rationale": "x" * 20_001},
        {"demonstration": "x" * 100_001},
    ],
)
def test_a_request_says_nothing_that_the_ledger_could_not_keep(said):
    with pytest.raises(ValidationError):
        JudgementBody.model_validate({"tiers": [[0], [1]], **said})
