"""Results of a task with some items judged by people and others not judged yet."""

from __future__ import annotations

import json

import pytest

from align.core.types import Conversation, Message
from align.evals.judges.judge_verdict import JudgeVerdict
from align.evals.stats.decisions import DecisionRule
from align.evals.suite.gates import EvalGate, decide_gate, describe_decision
from align.evals.suite.results import EvaluatedAnswer, ScoredTask, compute_results
from align.evals.suite.tasks import EvalItem

ITEMS = [
    EvalItem(str(i), str(i), "odd" if i % 2 else "even", Conversation((Message("user", f"{i}?"),)), None)
    for i in range(40)
]


def build_scored_task(**verdicts: list[JudgeVerdict]) -> ScoredTask:
    answers = {name: [EvaluatedAnswer("", f"{name} {item.id}", None) for item in ITEMS] for name in ("new", *verdicts)}
    return ScoredTask("t", "people", "people", ITEMS, answers, verdicts)


def build_verdicts(*ids: int, by: str = "ann", verdict: float = 1.0) -> list[JudgeVerdict]:
    return [JudgeVerdict(str(id), "first", verdict, by=by) for id in ids]


def test_what_nobody_judged_is_in_no_figure():
    verdicts = [
        *build_verdicts(*range(20)),
        *build_verdicts(0, by="bob", verdict=0.0),
        *build_verdicts(39, verdict=0.0),
    ]
    results = compute_results([build_scored_task(old=verdicts)], 0.95, 12)["t"]
    against = results["against"]["old"]
    assert (against["items"], against["difference"]["n"]) == (21, 21)
    assert against["win_rate"]["value"] == pytest.approx((19 + 0.5) / 21)
    assert results["categories"]["odd"]["old"]["difference"]["n"] == 11
    assert [row["id"] for row in results["regressions"]["old"]] == ["39"]
    assert results["items"] == 40
    assert json.loads(json.dumps(results)) == results


def test_a_system_that_nobody_judged_yet_is_left_out_and_the_others_are_not():
    results = compute_results(
        [build_scored_task(old=build_verdicts(*range(0, 40, 2)), base=[], older=build_verdicts(1, 3, verdict=0.5))],
        0.95,
        12,
    )["t"]
    assert [*results["against"]] == ["old", "older"]
    assert {*results["strengths"]["strengths"]} == {"new", "old", "older"}
    assert [*results["categories"]["even"]] == ["old"]
    unjudged = compute_results([build_scored_task(old=[])], 0.95, 12)["t"]
    assert (unjudged["against"], unjudged["regressions"]) == ({}, {})


def test_people_who_contradict_each_other_once_do_not_hold_up_a_gate() -> None:
    """One pair has two votes, which differ. They are of two people, and tell nothing about the order of answers."""
    verdicts = [*build_verdicts(*range(40)), JudgeVerdict("0", "second", 0.0, by="bob")]
    gate = EvalGate("better", "t", "old", DecisionRule("superior"))
    assert decide_gate(gate, [build_scored_task(old=verdicts)]).outcome == "pass"


@pytest.mark.parametrize(("judged", "outcome", "n"), [(0, "undecided", 0), (7, "undecided", 7), (40, "pass", 40)])
def test_a_gate_is_decided_on_what_is_there(judged, outcome, n):
    gate = EvalGate("better", "t", "old", DecisionRule("superior", least_n=8))
    decision = decide_gate(gate, [build_scored_task(old=build_verdicts(*range(judged)))])
    assert (decision.outcome, decision.figure.n) == (outcome, n)
    assert "gate better" in describe_decision(gate, decision)
    assert decision.n_to_decide == (19 if judged == 7 else None)  # all of seven won, which may be chance
