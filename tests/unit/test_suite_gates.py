"""Gates of a suite: their settings, their decisions, and the files that record the decisions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_runs import compute_artifact_digest, publish_file, write_run_folder

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.evals.stats.decisions import Decision, DecisionRule, Look, Outcome, decide_by_rule
from align.evals.stats.paired import compute_sample_size_for_pairs, compute_share_difference
from align.evals.suite.gates import (
    EvalGate,
    build_junit_xml,
    build_verdict_file,
    decide_gate,
    decide_gates,
    describe_decision,
    parse_gates,
)
from align.evals.suite.results import EvaluatedAnswer, ScoredTask, compare_means
from align.evals.suite.systems import System
from align.evals.suite.tasks import EvalItem, EvalTask
from align.ops.intervals import Interval
from align.ops.looks import compute_boundary_quantile, compute_sequence_quantile, quantile_to_level
from align.registry.gates import read_verdict
from align.reward.checkers import build_checker
from align.run import Input, write_json
from align.stages.eval.suite import Suite, describe_plans, find_earlier_looks

TASKS = [EvalTask("asked", "a.jsonl")]
SYSTEMS = ("new", "old", "base")
SPEC = {"kind": "regex", "pattern": "e"}
CHECK = build_checker(SPEC, "check")
GOOD = {"name": "safe", "task": "asked", "against": "old", "is": "superior"}


def build_scored_task(new: Sequence[float], old: Sequence[float], items_per_source: int = 1) -> ScoredTask:
    prompt = Conversation((Message("user", "a"),))
    items = [EvalItem(str(i), str(i // items_per_source), "", prompt, SPEC) for i in range(len(new))]
    answers_by_system = {
        system: [EvaluatedAnswer("", "", score, checked=CHECK("e" if score else "x")) for score in scores]
        for system, scores in (("new", new), ("old", old))
    }
    return ScoredTask("asked", "checks", "exact", items, answers_by_system)


def decide_outcome(new: Sequence[float], old: Sequence[float], **fields: Any) -> str:
    (gate,) = parse_gates([{"name": "g", "task": "asked", **fields}], TASKS, SYSTEMS)
    return decide_gate(gate, [build_scored_task(new, old)]).outcome


def draw_scores(p: float, n: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [float(generator.random() < p) for _ in range(n)]


def test_a_gate_passes_fails_or_is_undecided():
    good = draw_scores(0.9, 200, 0)
    bad = draw_scores(0.5, 200, 1)
    n = 200
    superior = {"against": "old", "is": "superior"}
    not_worse = {"against": "old", "is": "not_worse", "margin": 0.05}
    assert decide_outcome(good, bad, **superior) == "pass"
    assert decide_outcome(bad, good, **superior) == "fail"
    assert decide_outcome(good, good, **superior) == "undecided"
    assert decide_outcome(good, good, **not_worse) == "pass"
    assert decide_outcome(good[:30], good[:30], **not_worse) == "undecided", (
        "a loss in twenty makes 30 ties of 30 in 21 %"
    )
    assert decide_outcome(bad, good, **not_worse) == "fail"
    assert decide_outcome(good[:8], good[:8], **not_worse) == "undecided"
    assert decide_outcome(good, bad, **superior, least_n=n) == "pass"
    assert decide_outcome(good, bad, **superior, least_n=n + 1) == "undecided"
    assert decide_outcome(good, bad, **{"is": "superior", "margin": 0.8}) == "pass"
    assert decide_outcome(good, bad, **{"is": "superior", "margin": 0.95}) == "fail"
    assert decide_outcome([0.0] * n, bad, **{"is": "at_most", "margin": 0.05}) == "pass"
    assert decide_outcome(bad, good, **{"is": "at_most", "margin": 0.05}) == "fail"


def test_two_equal_systems_are_hardly_ever_called_better():
    """The gate passes in at most 3 % of evaluations of two equal systems, and detects a clear difference."""
    fields = {"against": "old", "is": "superior"}
    equal_outcomes = [
        decide_outcome(draw_scores(0.7, 200, seed), draw_scores(0.7, 200, 10_000 + seed), **fields)
        for seed in range(400)
    ]
    assert equal_outcomes.count("pass") <= 0.03 * len(equal_outcomes) + 3
    better_outcomes = [
        decide_outcome(draw_scores(0.85, 200, seed), draw_scores(0.7, 200, 10_000 + seed), **fields)
        for seed in range(100)
    ]
    assert better_outcomes.count("pass") >= 80


def test_a_gate_decides_by_the_interval_of_the_report():
    """Four items of each source: the difference that the report shows is clear, and so the gate passes."""
    task = build_scored_task(draw_scores(0.75, 240, 0), draw_scores(0.6, 240, 1), items_per_source=4)
    (gate,) = parse_gates([GOOD], TASKS, SYSTEMS)
    decision = decide_gate(gate, [task])
    assert decision.figure.as_dict() == compare_means(task, "old", 0.95)["difference"]
    assert (decision.outcome, decision.figure.n) == ("pass", 60)


def test_one_of_ten_gates_passes_if_one_passes_at_a_tenth_of_the_error() -> None:
    """`benchmarks/evals/simulation.py` computes only this step, for 20,000 samples."""
    tasks = [EvalTask(f"t{k}", "a.jsonl") for k in range(10)]
    specs = [{"name": task.name, "task": task.name, "against": "old", "is": "superior"} for task in tasks]
    gates = parse_gates(specs, tasks, SYSTEMS)
    rule = DecisionRule("superior", level=0.995)
    outcomes = set()
    for draw in range(20):
        samples = [
            (draw_scores(0.8, 100, 20 * draw + k), draw_scores(0.7, 100, 5000 + 20 * draw + k)) for k in range(10)
        ]
        scored = [
            replace(build_scored_task(*sample), name=task.name) for task, sample in zip(tasks, samples, strict=True)
        ]
        decisions = decide_gates(gates, scored, "any").values()
        differences = [compute_share_difference(*sample, level=0.995) for sample in samples]
        first_step = [decide_by_rule(rule, difference).outcome for difference in differences]
        has_passed = "pass" in first_step
        assert ("pass" in {decision.outcome for decision in decisions}) == has_passed
        outcomes.add(has_passed)
    assert outcomes == {False, True}


@pytest.mark.parametrize("max_n", [400, None])
def test_looks_are_decided_as_in_the_simulation(max_n: int | None) -> None:
    """With `max_n` by the boundary of Lan and DeMets, and on people's votes without it by a confidence sequence."""
    fields = {} if max_n is None else {"max_n": max_n}
    (gate,) = parse_gates([{**GOOD, **fields}], TASKS, SYSTEMS)
    counts = [100, 200, 300, 400]
    outcomes = set()
    for draw in range(6):
        new = draw_scores(0.8 if draw % 2 else 0.7, 400, draw)
        old = draw_scores(0.7, 400, 1000 + draw)
        looks: tuple[Look, ...] = ()
        for k, n in enumerate(counts):
            task = build_scored_task(new[:n], old[:n])
            decision = decide_gate(gate, [task if max_n else replace(task, role="people")], looks)
            looks = decision.looks
            if max_n:
                level = quantile_to_level(compute_boundary_quantile(counts[: k + 1], max_n))
            else:
                level = quantile_to_level(compute_sequence_quantile(n, 100))
            difference = compute_share_difference(new[:n], old[:n], level=level)
            assert decision.outcome == decide_by_rule(DecisionRule("superior", level=level), difference).outcome
            outcomes.add(decision.outcome)
            if decision.outcome != "undecided":
                break
    assert outcomes >= {"pass", "undecided"}


def test_one_gate_of_several_is_decided_at_a_higher_level():
    """Holm: 2 gates have level 0.975 each; once one passes, the other has 0.95."""
    task = build_scored_task(draw_scores(0.80, 200, 0), draw_scores(0.7, 200, 1))
    specs = [
        {"name": "clear", "task": "asked", "is": "superior", "margin": 0.5},
        {"name": "close", "task": "asked", "is": "superior", "margin": 0.755},
    ]
    gates = parse_gates(specs, TASKS, SYSTEMS)
    decisions = decide_gates(gates, [task], "any")
    assert [*decisions] == ["clear", "close"]
    assert (decisions["clear"].outcome, decisions["clear"].level) == ("pass", 0.975)
    alone = decide_gates(gates, [task])["close"]
    assert decisions["close"] == alone
    assert decisions["close"].level == 0.95
    lone = decide_gates(parse_gates([specs[1], {**specs[1], "name": "same"}], TASKS, SYSTEMS), [task], "any")
    assert [decision.level for decision in lone.values()] == [0.975, 0.975]


def test_looks_share_the_error_of_one():
    """Boundaries at a quarter, at half and at all of the planned items."""
    (gate,) = parse_gates([{**GOOD, "max_n": 400}], TASKS, SYSTEMS)
    new = ([1.0] * 14 + [0.0] * 6) * 24  # right where the other is wrong on 6 of 20 items, and wrong on 2 instead
    old = ([1.0] * 8 + [0.0] * 10 + [1.0] * 2) * 24
    decisions = [decide_gate(gate, [build_scored_task(new[:100], old[:100])])]
    decisions.append(decide_gate(gate, [build_scored_task(new[:200], old[:200])], decisions[0].looks))
    levels = [decision.level for decision in decisions]
    assert levels == pytest.approx([0.999985, 0.99695], abs=2e-5), "quantiles 4.333 and 2.963"
    assert [decision.outcome for decision in decisions] == ["undecided", "pass"]
    assert [(look.n, look.outcome) for look in decisions[1].looks] == [(100, "undecided"), (200, "pass")]
    assert decisions[0].n_to_decide is not None
    assert 150 < decisions[0].n_to_decide <= 200
    assert "evaluation 2 of this gate" in describe_decision(gate, decisions[1])
    again = decide_gate(gate, [build_scored_task(new[:100], old[:100])], decisions[0].looks)
    assert again == decisions[0], "the same data are the same look"


@pytest.mark.parametrize("n", [0, 20, 100, 200, 400])
def test_a_decided_gate_stays_decided_with_the_figure_that_decided_it(n: int) -> None:
    """On no items, on fewer than `least_n`, on those of the first look, on those that decided, and on more."""
    (gate,) = parse_gates([{**GOOD, "max_n": 400, "least_n": 50}], TASKS, SYSTEMS)
    new = [1.0, 1.0, 0.0, 0.0] * 100
    old = [1.0, 0.0] * 20 + [0.0] * 360
    first = decide_gate(gate, [build_scored_task(old[:100], new[:100])])
    looks = [replace(first.looks[0], outcome="undecided")]
    decided = decide_gate(gate, [build_scored_task(old[:200], new[:200])], looks)
    assert decided.outcome == "fail"
    later = decide_gate(gate, [build_scored_task(old[:n], new[:n])], decided.looks)
    assert later == replace(decided, why="an earlier evaluation decided it, on 200 items")
    line = describe_decision(gate, later)
    assert f"on 200 at level {decided.level:.6g}, evaluation 2 of this gate; an earlier evaluation" in line
    verdict = build_verdict_file(gate, later, {}, {})
    assert (verdict["figure"], verdict["level"]) == (decided.figure.as_dict(), decided.level)


def decide_after(*looks: tuple[int, Outcome], n: int, max_n: int = 400) -> Decision:
    (gate,) = parse_gates([{**GOOD, "max_n": max_n}], TASKS, SYSTEMS)
    earlier_looks = [
        Look(count, outcome, f"data {count}", Interval(0.1, 0.0, 0.2, count), 0.95) for count, outcome in looks
    ]
    return decide_gate(gate, [build_scored_task([1.0, 0.0] * (n // 2), [0.0, 1.0] * (n // 2))], earlier_looks)


def test_an_evaluation_without_more_data_is_no_further_look():
    same_n = decide_after((200, "undecided"), n=200)
    assert (same_n.outcome, len(same_n.looks)) == ("undecided", 1)
    assert "had 200 items, and this one does not have more" in same_n.why
    assert "does not have more" in decide_after((200, "undecided"), n=100).why
    assert "reached max_n=400" in decide_after((400, "undecided"), n=500).why
    assert decide_after((200, "fail"), n=300).outcome == "fail"
    last = decide_after((200, "undecided"), n=400)
    assert (last.n_to_decide, last.why) == (None, "max_n=400 is reached without a decision")
    assert last.level == pytest.approx(0.9510, abs=1e-4), "quantile 1.969"


def build_suite(*gates: dict[str, Any], **systems: str) -> Suite:
    """Return a suite of gates and systems, given as name → reference."""
    built = [
        System(name, ref, None, None, "", Input(compute_artifact_digest(ref), ref=ref)) for name, ref in systems.items()
    ]
    tasks = [*TASKS, EvalTask("other", "b.jsonl")]
    return Suite(built, tasks, "suite", {}, parse_gates(gates, tasks, [*systems]), "reward", [], None)


def write_looks(root: Path, suite: Suite, looks: Sequence[Look], family: str = "all", run: str = "eval:e") -> None:
    """Write the verdict file of a finished evaluation of the suite's first gate."""
    write_run_folder(root, run)
    folder = root / run.replace(":", "/")
    digests = {f"systems.{system.name}": system.record.digest for system in suite.systems}
    inputs = {"artifact": suite.systems[0].record.digest, **digests}
    gate = suite.gates[0]
    decision = Decision(looks[-1].outcome, looks[-1].figure, 0.0, None, looks=tuple(looks))
    plan = describe_plans(suite, family)[gate.name]
    path = folder / "artifact" / "verdicts" / f"{gate.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, build_verdict_file(gate, decision, inputs, plan))
    publish_file(folder, f"artifact/verdicts/{path.name}")


LOOKS = [
    Look(100, "undecided", "a", Interval(0.1, -0.1, 0.3, 100), 0.99998),
    Look(200, "fail", "b", Interval(-0.1, -0.2, -0.01, 200), 0.997),
]
REPEATED = {**GOOD, "margin": 0.05, "max_n": 400}


def find_looks(root: Path, suite: Suite, family: str = "all") -> Sequence[Look]:
    return find_earlier_looks(root, suite, describe_plans(suite, family))["safe"]


def test_earlier_looks_are_found_whatever_the_other_system_is_called(tmp_path: Path) -> None:
    write_looks(tmp_path, build_suite(REPEATED, new="ppo:a", old="sft:a"), LOOKS)
    renamed = {**REPEATED, "against": "previous"}
    assert find_looks(tmp_path, build_suite(renamed, mine="ppo:a", previous="sft:a")) == LOOKS
    assert find_looks(tmp_path, build_suite(renamed, mine="ppo:a", previous="sft:b")) == []
    assert find_looks(tmp_path, build_suite(renamed, mine="ppo:b", previous="sft:a")) == []


def test_a_decided_look_is_found_behind_a_larger_one(tmp_path: Path) -> None:
    suite = build_suite(REPEATED, new="ppo:a", old="sft:a")
    larger = replace(LOOKS[0], n=300)
    write_looks(tmp_path, suite, [larger])
    write_looks(tmp_path, suite, LOOKS, run="eval:f")
    assert find_looks(tmp_path, suite) == [larger, LOOKS[1]]


@pytest.mark.parametrize(
    ("changed", "family"),
    [
        ({"margin": 0.05 + 1e-9}, "all"),
        ({"is": "at_most"}, "all"),
        ({"task": "other"}, "all"),
        ({"level": 0.9}, "all"),
        ({"max_n": None}, "all"),
        ({"against": None}, "all"),
        ({"against": "base"}, "all"),
        ({}, "any"),
    ],
)
def test_a_changed_plan_is_refused(tmp_path: Path, changed: dict[str, Any], family: str) -> None:
    systems = {"new": "ppo:a", "old": "sft:a", "base": "sft:b"}
    write_looks(tmp_path, build_suite(REPEATED, **systems), LOOKS)
    with pytest.raises(InputError, match=r"eval\.gates\[0\].*with another plan"):
        find_looks(tmp_path, build_suite({**REPEATED, **changed}, **systems), family)


def test_another_gate_of_a_family_is_another_plan(tmp_path: Path) -> None:
    """Its number of gates decides the levels if one passed gate is enough."""
    systems = {"new": "ppo:a", "old": "sft:a"}
    write_looks(tmp_path, build_suite(REPEATED, **systems), LOOKS, "any")
    two_gates = build_suite(REPEATED, {**REPEATED, "name": "second"}, **systems)
    with pytest.raises(InputError, match="with another plan"):
        find_looks(tmp_path, two_gates, "any")
    write_looks(tmp_path, build_suite(REPEATED, **systems), LOOKS)
    assert find_looks(tmp_path, two_gates) == LOOKS


def test_a_plan_that_cannot_decide_says_so():
    (gate,) = parse_gates([{**GOOD, "max_n": 60}], TASKS, SYSTEMS)
    scores = draw_scores(0.6, 40, 0)
    decision = decide_gate(gate, [build_scored_task(scores, [*scores[:20], *draw_scores(0.6, 20, 1)])])
    assert (decision.outcome, decision.n_to_decide) == ("undecided", None)
    assert "no number of items up to max_n=60" in describe_decision(gate, decision)
    last = decide_gate(gate, [build_scored_task(scores * 2, [*scores[:20], *draw_scores(0.6, 20, 1)] * 2)])
    assert "max_n=60 is reached without a decision" in describe_decision(gate, last)


@pytest.mark.parametrize(("right", "n", "above"), [(20, 20, 0.9), (9, 10, 0.8), (38, 40, 0.9)])
def test_as_many_items_as_are_said_to_decide_do(right: int, n: int, above: float):
    rule = {"name": "g", "task": "asked", "is": "superior", "margin": above}
    (gate,) = parse_gates([rule], TASKS, SYSTEMS)
    scores = [1.0] * right + [0.0] * (n - right)
    decision = decide_gate(gate, [build_scored_task(scores, scores)])
    assert decision.outcome == "undecided"
    assert decision.n_to_decide is not None
    repeated_outcomes = [
        decide_gate(
            gate, [build_scored_task(draw_scores(right / n, decision.n_to_decide, seed), [0.0] * decision.n_to_decide)]
        ).outcome
        for seed in range(60)
    ]
    assert repeated_outcomes.count("undecided") <= 0.2 * len(repeated_outcomes) + 7


def test_what_is_written_down(tmp_path: Any):
    (gate,) = parse_gates([GOOD], TASKS, SYSTEMS)
    decision = decide_gate(gate, [build_scored_task([1.0, 0.0] * 5, [0.0, 1.0] * 5)])
    assert describe_decision(gate, decision).startswith(
        "gate safe: undecided (asked: better than old by more than 0: 0.000 ["
    )
    (small_gate,) = parse_gates([{**GOOD, "name": "small", "margin": 0.3}], TASKS, SYSTEMS)
    small_decision = decide_gate(small_gate, [build_scored_task([1.0] * 30 + [0.0] * 10, [1.0, 0.0] * 20)])
    assert small_decision.outcome == "undecided"
    assert small_decision.n_to_decide is not None
    assert small_decision.n_to_decide > 40
    assert f"{small_decision.n_to_decide:,} items would decide" in describe_decision(small_gate, small_decision)
    write_json(tmp_path / "safe.json", build_verdict_file(gate, decision, {"artifact": "a" * 64}, {}))
    verdict = read_verdict(tmp_path / "safe.json", "here", None)
    assert (verdict.gate, verdict.verdict, verdict.inputs) == ("safe", "undecided", {"artifact": "a" * 64})
    tree = ElementTree.fromstring(build_junit_xml("quality <&>", {"safe": (gate, decision)}))
    assert (tree.get("name"), tree.get("tests"), tree.get("failures")) == ("quality <&>", "1", "1")
    failure = tree.find("testcase/failure")
    assert failure is not None
    assert failure.get("type") == "undecided"


@pytest.mark.parametrize(
    ("gates", "named"),
    [
        ({"name": "x"}, "eval.gates"),
        (["x"], "eval.gates[0]"),
        ([{**GOOD, "kind": "x"}], "eval.gates[0].kind"),
        ([{**GOOD, "name": "a b"}], "eval.gates[0].name"),
        ([{**GOOD, "task": "x"}], "eval.gates[0].task"),
        ([{**GOOD, "against": "new"}], "eval.gates[0].against"),
        ([{**GOOD, "against": "x"}], "eval.gates[0].against"),
        ([{**GOOD, "is": "better"}], "eval.gates[0].is"),
        ([{**GOOD, "figure": "score"}], "eval.gates[0].figure"),
        ([{**GOOD, "margin": 1.0}], "eval.gates[0].margin"),
        ([{**GOOD, "level": 0.05}], "eval.gates[0].level"),
        ([{**GOOD, "margin": "0.1"}], "eval.gates[0].margin"),
        ([{**GOOD, "margin": -1}], "eval.gates[0].margin"),
        ([{**GOOD, "margin": float("nan")}], "eval.gates[0].margin"),
        ([{**GOOD, "level": 1}], "eval.gates[0].level"),
        ([{**GOOD, "least_n": 0}], "eval.gates[0].least_n"),
        ([{**GOOD, "least_n": 1.5}], "eval.gates[0].least_n"),
        ([{**GOOD, "max_n": 0}], "eval.gates[0].max_n"),
        ([{**GOOD, "least_n": 100, "max_n": 99}], "eval.gates[0].max_n"),
        ([{**GOOD, "is": "not_worse"}], "eval.gates[0].margin"),
        ([{"name": "x", "task": "asked", "is": "superior"}], "eval.gates[0].margin"),
        ([GOOD, GOOD], "eval.gates[1].name"),
        ([{"name": "x", "task": "asked", "is": "not_worse", "margin": 0.1}], "eval.gates[0].is"),
        ([{"name": "x", "task": "asked", "is": "superior", "figure": "difference"}], "eval.gates[0].figure"),
    ],
)
def test_gates_that_are_refused(gates: Any, named: str):
    with pytest.raises(InputError) as error:
        parse_gates(gates, TASKS, SYSTEMS)
    assert error.value.field == named


@pytest.mark.parametrize("n", [2, 20, 100])
def test_where_none_differ_the_number_that_decides_is_the_same_however_many_there_are(n: int) -> None:
    """1.96² / (n + 1.96²) is below the margin from n = 189 on. Fewer items do not decide."""
    gate = EvalGate("keeps", "asked", "old", DecisionRule("not_worse", 0.02))
    scores = [1.0] * n
    assert decide_gate(gate, [build_scored_task(scores, scores)]).n_to_decide == 189, "not less for few, and not more"
    assert decide_gate(gate, [build_scored_task([1.0] * 188, [1.0] * 188)]).outcome == "undecided"
    assert decide_gate(gate, [build_scored_task([1.0] * 189, [1.0] * 189)]).outcome == "pass"


def test_the_number_that_would_decide_does_in_four_of_five() -> None:
    generator = np.random.default_rng(0)

    def draw_pairs(n: int) -> tuple[list[float], list[float]]:
        uniform = generator.random(n)
        return (uniform >= 0.1).astype(float).tolist(), ((uniform < 0.1) | (uniform >= 0.22)).astype(float).tolist()

    pilot_pairs = draw_pairs(100_000)
    rule = DecisionRule("superior", 0.0)
    n = compute_sample_size_for_pairs(*pilot_pairs, 0.0)
    assert n is not None
    passes = [decide_by_rule(rule, compute_share_difference(*draw_pairs(n))).outcome == "pass" for _ in range(300)]
    assert 0.72 < sum(passes) / 300 < 0.92
