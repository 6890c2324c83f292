"""Figures of held-out pairs by their labels, and by the noiseless order of the scorer that labelled them, if known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.core.types import Message, Preference
from align.evals.held_out import compute_preference_figures, find_simulated_scorers
from align.reward.rules import BY_NAME, Sentiment, get_last_answer


class Shortest:
    """A scorer that prefers short answers."""

    name = "shortest"

    def score(self, conversations, rollout=None):
        return torch.tensor([-float(len(get_last_answer(c))) for c in conversations])


def build_pair(chosen: str, rejected: str, scorer: str = "vader", source: str = "simulated", n: int = 0) -> Preference:
    prompt = (Message("user", "Hello?"),)
    answers = ((Message("assistant", text),) for text in (chosen, rejected))
    return Preference(prompt, *answers, id=f"{n}", group_id=f"g{n}", source=source, scorer=scorer)


PAIRS = [
    build_pair("I love you, wonderful friend", "I hate this", n=0),
    build_pair("awful", "what a great and lovely day", n=1),  # against the sentiment: noise
]
GAP = torch.tensor([1.0, -1.0])  # agrees with the sentiment on both, with the labels on one


def test_the_scorer_of_the_votes_is_the_noiseless_order() -> None:
    figures = compute_preference_figures(PAIRS, GAP)
    assert {name: figure["value"] for name, figure in figures.items()} == {
        "accuracy": 0.5,
        "accuracy_noiseless": 1.0,
        "ceiling": 0.5,
    }
    assert find_simulated_scorers(PAIRS) == {"simulated_by": ["vader"]}


def test_it_is_that_scorer_and_not_always_the_sentiment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BY_NAME, "shortest", Shortest)
    figures = compute_preference_figures([replace(pair, scorer="shortest") for pair in PAIRS], GAP)
    assert figures["accuracy_noiseless"]["value"] == 0.0  # it prefers "I hate this", and "awful"
    assert figures["ceiling"]["value"] == 0.5
    assert find_simulated_scorers([replace(pair, scorer="shortest") for pair in PAIRS]) == {
        "simulated_by": ["shortest"]
    }


@pytest.mark.parametrize(
    "scorers", [("", ""), ("vader", ""), ("vader", "shortest"), ("a stranger", "a stranger")], ids=" ".join
)
def test_where_nobody_said_who_ranked_nothing_is_made_up(scorers: tuple[str, str]) -> None:
    """A file may call any votes `simulated`: those of another model are not compared with VADER's order."""
    prefs = [replace(pair, scorer=scorer) for pair, scorer in zip(PAIRS, scorers, strict=True)]
    assert list(compute_preference_figures(prefs, GAP)) == ["accuracy"]
    assert find_simulated_scorers(prefs).get("simulated_by", []) == sorted({scorer for scorer in scorers if scorer})


def test_every_scorer_that_may_stand_in_for_people_is_known_by_its_own_name() -> None:
    assert {name: scorer.name for name, scorer in BY_NAME.items()} == {name: name for name in BY_NAME}
    assert Sentiment.name in BY_NAME
