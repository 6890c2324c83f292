"""Alarms name the annotators who do not judge the answers, by their votes in a store, and no others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import pytest
from annotation_store import build_prompt, build_store_url

from align.annotate.figures.alarms import ALARMS, AnnotatorAssessment, assess_annotators
from align.annotate.figures.project import read_view
from align.annotate.store import Candidate, Judgement, Store
from align.annotate.store.quarantine import quarantine_annotator

ITEMS = 120
ATTENTIVE = ("ann", "bea", "cem", "dan", "eve")
STRENGTHS = (0.0, 1.5, 3.0)


def rank_attentively(ids: Sequence[str], draw: random.Random) -> tuple[tuple[str, ...], ...]:
    noisy = {id: strength - draw.gammavariate(1, 1) for id, strength in zip(ids, STRENGTHS, strict=True)}
    return tuple((id,) for id in sorted(ids, key=lambda id: -noisy[id]))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in which two attentive annotators rank each item, and one of the four below in turn.

    `left` ranks by the place on the screen, `copy` as the first annotator of the item, `coin` at random, and `fast`
    attentively in half a second.
    """
    draw = random.Random(1)
    with Store.open(build_store_url(tmp_path)) as store, store.transaction():
        crews = list(combinations(ATTENTIVE, 2))
        for i in range(ITEMS):
            answers = [Candidate(f"answer {k} " + "word " * 40) for k in range(3)]
            item = store.add_item("p", f"run/{i}", build_prompt(f"question {i}"), answers)
            ids = [f"{item}-{k}" for k in range(3)]
            first_ranking = None
            for name in (*crews[i % len(crews)], ("left", "copy", "coin", "fast")[i % 4]):
                display_order = draw.sample(ids, 3)
                tiers = rank_attentively(ids, draw)
                if name == "left":
                    tiers = tuple((id,) for id in display_order)
                elif name == "copy":
                    tiers = first_ranking
                elif name == "coin":
                    tiers = tuple((id,) for id in draw.sample(ids, 3))
                first_ranking = first_ranking or tiers
                judgement = Judgement(
                    tiers, display_order=tuple(display_order), seconds=0.5 if name == "fast" else draw.uniform(15, 60)
                )
                store.record("p", item, judgement, annotator=name, key=f"{name}/{i}")
        yield store


def assess(store: Store) -> dict[str, AnnotatorAssessment]:
    view = read_view(store, "p")
    return {view.identities[assessment.pseudonym]: assessment for assessment in assess_annotators(view)}


def list_alarms(assessments: dict[str, AnnotatorAssessment]) -> dict[str, list[str]]:
    return {
        name: [alarm.kind for alarm in assessment.alarms]
        for name, assessment in assessments.items()
        if assessment.alarms
    }


def test_alarms_name_those_who_do_not_judge(store: Store) -> None:
    assessments = assess(store)
    assert list_alarms(assessments) == {"left": ["side"], "copy": ["copies"], "coin": ["disagrees"], "fast": ["fast"]}
    assert list(assessments)[:4] == ["left", "copy", "coin", "fast"]
    assert assessments["left"].first_share > 0.8
    assert max(abs(assessments[name].first_share - 0.5) for name in ATTENTIVE) < 0.2
    assert assessments["coin"].accuracy < min(assessments[name].accuracy for name in ATTENTIVE)
    assert {alarm.kind for assessment in assessments.values() for alarm in assessment.alarms} <= ALARMS.keys()


def test_annotators_in_quarantine_are_not_assessed(store: Store) -> None:
    pseudonym = store.pseudonym("p", "left")
    assert pseudonym is not None
    quarantine_annotator(store, "p", pseudonym)
    assessments = assess(store)
    assert "left" not in assessments
    assert "copy" in list_alarms(assessments)


def test_missed_gold_items_raise_an_alarm(store: Store) -> None:
    for i in range(12):
        answers = [Candidate(f"gold {k} {i}") for k in range(2)]
        item = store.add_item("p", f"gold/{i}", build_prompt(f"gold {i}"), answers, expected=((0,), (1,)))
        right = ((f"{item}-0",), (f"{item}-1",))
        wrong = right[::-1]
        for name in ATTENTIVE:
            is_wrong = (name == "eve" and i < 6) or (name == "dan" and i == 0)
            judgement = Judgement(wrong if is_wrong else right, purpose="gold")
            store.record("p", item, judgement, annotator=name, key=f"gold/{name}/{i}")
    alarms = list_alarms(assess(store))
    assert alarms["eve"] == ["gold"]
    assert "dan" not in alarms


def test_a_project_without_rankings_has_no_assessments(tmp_path: Path) -> None:
    with Store.open(build_store_url(tmp_path)) as store:
        store.add_item("p", "run/0", build_prompt(), [Candidate("a"), Candidate("b")])
        assert assess(store) == {}
