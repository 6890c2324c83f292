"""Verdicts of judges: merging both orders and several people, results, and gates on them."""

from __future__ import annotations

import pytest

from align.core.types import Conversation, Message
from align.evals.judges.judge_verdict import (
    FIRST,
    SECOND,
    JudgeVerdict,
    collect_both_orders,
    judge_by_scores,
    merge_verdicts,
)
from align.evals.stats.decisions import DecisionRule
from align.evals.suite.gates import EvalGate, decide_gate, describe_decision
from align.evals.suite.results import EvaluatedAnswer, ScoredTask, compute_results
from align.evals.suite.tasks import EvalItem
from align.reward.checkers.checked import Checker, Part

PROMPT = Conversation((Message("user", "?"),))


def build_task(verdicts: list[JudgeVerdict], lengths: tuple[int, int] = (4, 4)) -> ScoredTask:
    ids = [*dict.fromkeys(verdict.prompt for verdict in verdicts)]
    items = [EvalItem(id, id, "", PROMPT, None) for id in ids]
    answers = {
        name: [EvaluatedAnswer("", "x" * n) for _ in ids] for name, n in zip(("new", "old"), lengths, strict=True)
    }
    return ScoredTask("chat", "a judge", "gold", items, answers, {"old": verdicts})


def build_both_orders(id: str, first: float, second: float) -> list[JudgeVerdict]:
    return [JudgeVerdict(id, FIRST, first), JudgeVerdict(id, SECOND, second)]


def test_what_does_not_survive_the_swap_is_a_tie():
    verdicts = [
        *build_both_orders("1", 1, 1),
        *build_both_orders("2", 1, 0),
        *build_both_orders("3", 0, 0),
        *build_both_orders("4", 0.5, 1),
    ]
    assert merge_verdicts(verdicts) == {"1": 1, "2": 0.5, "3": 0, "4": 0.5}


def test_people_count_alike_and_each_one_once():
    verdicts = [
        JudgeVerdict("1", FIRST, 1, by="ann"),
        JudgeVerdict("1", SECOND, 1, by="ann"),
        JudgeVerdict("1", FIRST, 0, by="bo"),
    ]
    assert merge_verdicts(verdicts) == {"1": 0.5}
    assert merge_verdicts([*verdicts, JudgeVerdict("1", SECOND, 0.5, by="cy")]) == {"1": 0.5}
    assert merge_verdicts([*verdicts, JudgeVerdict("1", SECOND, 1, by="cy")])["1"] == pytest.approx(2 / 3)


def test_a_scorers_verdicts_follow_from_its_scores():
    verdicts = judge_by_scores(["1", "2", "3"], [1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert [verdict.verdict for verdict in verdicts] == [0, 0.5, 1]
    assert {verdict.order for verdict in verdicts} == {""}
    assert not collect_both_orders(verdicts)


def test_always_the_first_shown_is_even_and_never_consistent():
    verdicts = [verdict for i in range(40) for verdict in build_both_orders(str(i), 1, 0)]
    results = compute_results([build_task(verdicts)], 0.95, 3)["chat"]
    against = results["against"]["old"]
    assert against["win_rate"]["value"] == 0.5
    assert against["difference"]["value"] == 0
    assert against["swap"]["consistency"]["value"] == 0
    assert against["swap"]["shown_first"]["value"] == 1
    assert "score" not in results["systems"]["new"]


def test_wins_less_losses_are_the_difference_of_what_is_compared():
    verdicts = [verdict for i in range(40) for verdict in build_both_orders(str(i), *((1, 1) if i < 30 else (0, 0)))]
    results = compute_results([build_task(verdicts)], 0.95, 3)["chat"]
    against = results["against"]["old"]
    assert against["win_rate"]["value"] == 0.75
    assert against["difference"]["value"] == 0.5
    assert (against["first"]["value"], against["second"]["value"]) == (0.75, 0.25)
    assert (against["better"], against["worse"]) == (30, 10)
    assert against["p"] == pytest.approx(0.0022, abs=1e-4)  # binomial: 10 of 40 or fewer, twice
    assert results["regressions"]["old"] == [{"id": str(i), "by": 1} for i in range(30, 33)]


def test_judgements_without_a_verdict_are_ties_and_counted():
    failed = JudgeVerdict("9", FIRST, 0.5, error="answered in prose")
    results = compute_results(
        [build_task([*build_both_orders("1", 1, 1), failed, JudgeVerdict("9", SECOND, 1.0)])], 0.95, 3
    )["chat"]
    assert results["against"]["old"]["no_verdict"] == 1
    assert results["against"]["old"]["win_rate"]["value"] == 0.75
    assert failed.as_dict() == {
        "prompt": "9",
        "order": "first",
        "verdict": 0.5,
        "p": None,
        "error": "answered in prose",
    }


def test_a_check_that_raises_scores_nothing_and_is_counted():
    def divide_by_zero(answer: str) -> list[Part]:
        raise ZeroDivisionError(answer)

    check_result = Checker("mine", ("one",), divide_by_zero)("x")
    failed = EvaluatedAnswer("", "x", check_result.score, checked=check_result)
    assert failed.as_dict()["error"] == "ZeroDivisionError: x"
    items = [EvalItem("1", "1", "", PROMPT, None)]
    scored = ScoredTask("sums", "checks", "exact", items, {"new": [failed], "old": [failed]})
    figures = compute_results([scored], 0.95, 3)["sums"]["systems"]["new"]
    assert figures["errors"] == 1
    assert figures["score"]["value"] == 0


def test_scores_of_a_judge_that_compares_are_asked_of_nobody():
    with pytest.raises(ValueError, match="compares answers to chat in pairs"):
        build_task(build_both_orders("1", 1, 1)).get_scores("new")


CHAT = EvalGate("keeps", "chat", "old", DecisionRule("not_worse", 0.15))


def test_a_gate_is_not_passed_by_a_judge_that_says_nothing():
    verdicts = [JudgeVerdict(str(i), order, 0.5, error="prose") for i in range(200) for order in (FIRST, SECOND)]
    decision = decide_gate(CHAT, [build_task(verdicts)])
    assert (decision.outcome, decision.n_to_decide) == ("undecided", None)
    assert "400 judgements without a verdict could change it" in describe_decision(CHAT, decision)


@pytest.mark.parametrize(("won", "failed", "outcome"), [(190, 5, "pass"), (60, 140, "undecided"), (0, 5, "fail")])
def test_it_is_decided_where_no_missing_verdict_could_change_it(won: int, failed: int, outcome: str):
    verdicts = [
        verdict for i in range(200 - failed) for verdict in build_both_orders(str(i), *((1, 1) if i < won else (0, 0)))
    ]
    failed_verdicts = [
        verdict
        for i in range(failed)
        for verdict in (JudgeVerdict(f"x{i}", FIRST, 0.5, error="cut"), JudgeVerdict(f"x{i}", SECOND, 1))
    ]
    assert decide_gate(CHAT, [build_task([*verdicts, *failed_verdicts])]).outcome == outcome


def test_a_gate_is_not_passed_by_a_judge_of_places():
    decision = decide_gate(
        CHAT, [build_task([verdict for i in range(200) for verdict in build_both_orders(str(i), 1, 0)])]
    )
    assert decision.outcome == "undecided"
    assert "by their position" in decision.why


def test_a_gate_of_shares_is_not_passed_by_answers_that_nobody_graded():
    graded = [EvaluatedAnswer("", "x", 1.0) for _ in range(60)] + [
        EvaluatedAnswer("", "x", 0.5, error="cut") for _ in range(40)
    ]
    items = [EvalItem(str(i), str(i), "", PROMPT, None) for i in range(100)]
    scored_task = ScoredTask("chat", "a judge", "graded", items, {"new": graded, "old": graded})
    gate = EvalGate("refuses", "chat", "", DecisionRule("superior", 0.7))
    assert decide_gate(gate, [scored_task]).outcome == "undecided"
    assert decide_gate(EvalGate("refuses", "chat", "", DecisionRule("superior", 0.4)), [scored_task]).outcome == "pass"
