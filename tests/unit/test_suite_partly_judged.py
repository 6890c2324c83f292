"""Results of a task of which people have judged some items and not yet others."""

from __future__ import annotations

import json

import pytest

from align.core.types import Conversation, Message
from align.evals.judges.judge_verdict import JudgeVerdict
from align.evals.stats import DecisionRule
from align.evals.suite.gates import EvalGate, decide_gate, describe_decision
from align.evals.suite.results import EvaluatedAnswer, ScoredTask, compute_results
from align.evals.suite.tasks import EvalItem

ITEMS = [
    EvalItem(str(i), str(i), "odd" if i % 2 else "even", Conversation((Message("user", f"{i}?"),)), None)
    for i in range(40)
]


def scored(**verdicts: list[JudgeVerdict]) -> ScoredTask:
    said = {name: [EvaluatedAnswer("", f"{name} {item.id}", None) for item in ITEMS] for name in ("new", *verdicts)}
    return ScoredTask("t", "people", "people", ITEMS, said, verdicts)


def won(*ids: int, by: str = "ann", verdict: float = 1.0) -> list[JudgeVerdict]:
    return [JudgeVerdict(str(id), "first", verdict, by=by) for id in ids]


def test_what_nobody_judged_is_in_no_figure():
    some = [*won(*range(20)), *won(0, by="bob", verdict=0.0), *won(39, verdict=0.0)]
    found = compute_results([scored(old=some)], 0.95, 12)["t"]
    told = found["against"]["old"]
    assert (told["items"], told["difference"]["n"]) == (21, 21)
    assert told["win_rate"]["value"] == pytest.approx((19 + 0.5) / 21)
    assert found["categories"]["odd"]["old"]["difference"]["n"] == 11
    assert [row["id"] for row in found["regressions"]["old"]] == ["39"]
    assert found["items"] == 40
    assert json.loads(json.dumps(found)) == found


def test_a_system_that_nobody_judged_yet_is_left_out_and_the_others_are_not():
    found = compute_results([scored(old=won(*range(0, 40, 2)), base=[], older=won(1, 3, verdict=0.5))], 0.95, 12)["t"]
    assert [*found["against"]] == ["old", "older"]
    assert {*found["strengths"]["strengths"]} == {"new", "old", "older"}
    assert [*found["categories"]["even"]] == ["old"]
    nobody = compute_results([scored(old=[])], 0.95, 12)["t"]
    assert (nobody["against"], nobody["regressions"]) == ({}, {})


@pytest.mark.parametrize(("judged", "outcome", "n"), [(0, "undecided", 0), (7, "undecided", 7), (40, "pass", 40)])
def test_a_gate_is_decided_on_what_is_there(judged, outcome, n):
    gate = EvalGate("better", "t", "old", DecisionRule("superior", least_n=8))
    found = decide_gate(gate, [scored(old=won(*range(judged)))])
    assert (found.outcome, found.figure.n) == (outcome, n)
    assert "gate better" in describe_decision(gate, found)
    assert found.n_to_decide == (9 if judged == 7 else None)  # all of seven won, and chance has its part
