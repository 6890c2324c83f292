"""Collapse verdicts on systems of a suite: open and closed tasks, comparisons, and their effect on gates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from test_collapse import PROMPTS, TOPICS, draw_varied_answers
from test_suite_gates import build_scored_task

from align.core.errors import InputError
from align.core.types import Conversation, Message
from align.evals.collapse import COLLAPSED, NOT_MEASURED, VARIED, Collapse, SystemAnswers, describe_collapse
from align.evals.judges.llm_judge import REFUSES
from align.evals.suite.gates import decide_gate, decide_on_collapse, describe_decision, parse_gates
from align.evals.suite.scores import (
    SMALL_TASKS,
    FirstAnswers,
    Judge,
    build_closed_score,
    combine_verdicts_by_system,
    is_closed,
    measure_closed_task,
    measure_open_tasks,
    score_by_scorer,
)
from align.evals.suite.tasks import HARMLESS, EvalItem, EvalTask, parse_tasks
from align.reward.rules import Rules, build_rule

ONE = ["Haha yeah I love it!"] * 80


def build_items(prompts: Sequence[str] = PROMPTS, **more: Any) -> list[EvalItem]:
    return [
        EvalItem(
            str(i), str(i), "", Conversation((Message("user", prompt),)), more.get("check"), then=more.get("then", ())
        )
        for i, prompt in enumerate(prompts)
    ]


def build_answers(
    prompts: Sequence[str] = PROMPTS, items: Sequence[EvalItem] | None = None, **systems: Any
) -> FirstAnswers:
    """Build first answers. A list of texts is used as both greedy and sampled answers."""
    answers_by_system = {
        name: texts if isinstance(texts, SystemAnswers) else SystemAnswers(texts, texts)
        for name, texts in systems.items()
    }
    return FirstAnswers(items or build_items(prompts), prompts, answers_by_system)


def list_verdicts(task: FirstAnswers) -> dict[str, str]:
    return {name: measured.collapse.verdict for name, measured in measure_open_tasks({"chat": task})["chat"].items()}


def test_each_system_is_compared_with_the_second_one():
    texts = draw_varied_answers(1)
    assert list_verdicts(build_answers(new=ONE, old=draw_varied_answers(), third=texts)) == {
        "new": COLLAPSED,
        "old": VARIED,
        "third": VARIED,
    }
    assert list_verdicts(build_answers(new=texts, old=ONE)) == {"new": VARIED, "old": COLLAPSED}
    assert list_verdicts(build_answers(new=ONE, old=ONE, third=texts)) == {
        "new": COLLAPSED,
        "old": COLLAPSED,
        "third": VARIED,
    }
    reasons = measure_open_tasks({"chat": build_answers(new=texts, old=ONE)})["chat"]["old"].collapse.reasons
    assert reasons == ("100\xa0% [95, 100] of its greedy answers are alike: “Haha yeah I love it!”",)


def test_a_file_shows_that_it_collapsed_and_not_that_it_did_not():
    file = SystemAnswers(ONE, None, "a file has none")
    assert list_verdicts(build_answers(new=file, old=draw_varied_answers())) == {"new": COLLAPSED, "old": VARIED}
    measured = measure_open_tasks(
        {"chat": build_answers(new=file._replace(sampled=draw_varied_answers(1)), old=draw_varied_answers())}
    )["chat"]
    assert measured["new"].collapse == Collapse(NOT_MEASURED, ("no answers at temperature 0: a file has none",))
    assert [*measured["new"].variety] == ["sampled"]
    # A greedy system beside a file is judged by its own greedy answers.
    file = file._replace(sampled=draw_varied_answers())
    sampled_only = SystemAnswers(draw_varied_answers(1), ONE)
    assert list_verdicts(build_answers(new=sampled_only, theirs=file)) == {"new": COLLAPSED, "theirs": NOT_MEASURED}


def test_tasks_with_few_prompts_are_measured_together():
    parts = {
        name: build_answers(PROMPTS[rows], build_items(PROMPTS[rows]), new=ONE[rows], old=draw_varied_answers()[rows])
        for name, rows in (("a", slice(0, 40)), ("b", slice(40, 80)))
    }
    measured = measure_open_tasks(parts)
    assert [*measured] == [SMALL_TASKS]
    assert measured[SMALL_TASKS]["new"].variety["greedy"].policy.answers == 80
    overall = combine_verdicts_by_system(measured, ["new", "old"])
    assert (overall["new"].verdict, overall["old"].verdict) == (COLLAPSED, VARIED)
    assert overall["new"].reasons[0].startswith(f"on {SMALL_TASKS} 100\xa0% ")
    single_task = measure_open_tasks({"a": parts["a"]})["a"]["new"].collapse
    assert single_task == Collapse(NOT_MEASURED, ("40 distinct prompts, 64 are needed",))


@pytest.mark.parametrize(
    ("task", "check", "default", "expected"),
    [
        (EvalTask("t"), None, None, False),
        (EvalTask("t"), None, True, True),
        (EvalTask("t", closed=False), None, True, False),
        (EvalTask("t", closed=True), None, None, True),
        (EvalTask("t"), {"kind": "exact", "answers": ["4"]}, None, True),
        (EvalTask("t"), {"kind": "exact", "choices": ["a", "b"], "answers": ["a"]}, None, True),
        (EvalTask("t"), {"kind": "regex", "pattern": "e"}, None, True),
        (EvalTask("t"), {"kind": "json_schema", "schema": {}}, None, True),
        (EvalTask("t"), {"kind": "code", "tests": "x"}, None, False),
        (EvalTask("t"), {"kind": "instructions"}, None, False),
        (EvalTask("t"), [None, {"kind": "exact", "answers": ["4"]}], None, True),
        (EvalTask("t", "own.jsonl", asks=REFUSES), None, None, True),
        (EvalTask("t", HARMLESS, asks=REFUSES), None, None, False),
        (EvalTask("t", asks="Is the answer polite?"), None, None, False),
    ],
)
def test_where_many_prompts_may_share_one_right_answer(
    task: EvalTask, check: Any, default: bool | None, expected: bool
):
    assert is_closed(task, build_items(check=check)[:2], default) is expected


def test_where_the_checks_of_the_rows_judge_one_answer_may_be_right():
    assert is_closed(EvalTask("t"), build_items()[:2], None, is_judged_by_checks=True)
    assert not is_closed(EvalTask("t"), build_items()[:2], False, is_judged_by_checks=True)
    assert not is_closed(EvalTask("t"), build_items(check={"kind": "instructions"})[:2], None, is_judged_by_checks=True)
    right = Rules([(1.0, build_rule({"rule": "regex", "pattern": "yes"}))])
    judge = Judge(partial(score_by_scorer, right, "rules", "gold", False), scorer=right, best=1.0)
    measured = measure_closed_task(
        build_answers(new=["yes"] * 80, old=ONE), build_closed_score(build_items(), False, judge, False)
    )
    assert measured["new"].collapse == Collapse(NOT_MEASURED, ("“yes” is right for every prompt",))


def test_a_task_says_that_it_is_closed():
    (task,) = parse_tasks([{"name": "t", "path": "t.jsonl", "closed": True}], False)
    assert task.closed is True
    for fields in ({"closed": "yes"}, {"closed": True, "probe": "loss"}):
        with pytest.raises(InputError, match="closed"):
            parse_tasks([{"name": "t", "path": "t.jsonl", **fields}], False)


def measure_closed_collapse(items: Sequence[EvalItem], **systems: Any) -> dict[str, Collapse]:
    task = build_answers(PROMPTS, items, **systems)
    systems_measured = measure_closed_task(task, build_closed_score(items, False, None, False))
    return {name: measured.collapse for name, measured in systems_measured.items()}


def test_a_closed_task_with_a_majority_class():
    right = ["yes" if i % 4 else "no" for i in range(80)]
    items = [
        item._replace(check={"kind": "exact", "answers": [text]})
        for item, text in zip(build_items(), right, strict=True)
    ]
    noisy = [text if i % 9 else "maybe" for i, text in enumerate(right)]
    collapses = measure_closed_collapse(items, new=right, old=["yes"] * 80, noisy=noisy, minority=["no"] * 80)
    assert {name: collapse.verdict for name, collapse in collapses.items()} == {
        "new": VARIED,
        "old": COLLAPSED,
        "noisy": VARIED,
        "minority": COLLAPSED,
    }
    assert (
        collapses["minority"]
        .reasons[0]
        .startswith("it is not shown to beat “yes”, given as the answer to every prompt")
    )
    # A file of right answers proves nothing about temperature 0. A file of the majority class shows collapse.
    files = {"new": SystemAnswers(right, None, "a file has none"), "old": SystemAnswers(["yes"] * 80, None, "it")}
    assert [each.verdict for each in measure_closed_collapse(items, **files).values()] == [NOT_MEASURED, COLLAPSED]


def test_the_majority_class_in_other_words_each_time():
    right = ["A" if i % 4 else "B" for i in range(80)]
    items = [
        item._replace(check={"kind": "regex", "pattern": f"\\({text}\\)"})
        for item, text in zip(build_items(), right, strict=True)
    ]
    worded = [f"({'A'}) because of {words}" for words in draw_varied_answers(2)]
    reasoned = [f"({text}) because of {words}" for text, words in zip(right, draw_varied_answers(3), strict=True)]
    collapses = measure_closed_collapse(items, new=worded, old=reasoned)
    assert {name: collapse.verdict for name, collapse in collapses.items()} == {"new": COLLAPSED, "old": VARIED}


def test_weak_answers_over_all_letters_are_no_collapse():
    """Four letters in equal shares, 31 % of them right, are not constant, though hardly better than a constant."""
    letters = "ABCD"
    right = [letters[i % 4] for i in range(80)]
    items = [
        item._replace(check={"kind": "exact", "answers": [text]})
        for item, text in zip(build_items(), right, strict=True)
    ]
    weak = [text if i % 16 < 5 else letters[(i + 1) % 4] for i, text in enumerate(right)]
    collapses = measure_closed_collapse(items, new=weak, old=right)
    assert {name: collapse.verdict for name, collapse in collapses.items()} == {"new": VARIED, "old": VARIED}


def test_wrong_answers_that_differ_are_no_collapse():
    """All answers to a hard task are wrong, so that none beats a constant one."""
    items = build_items(check={"kind": "exact", "answers": ["12345"]})
    numbers = [str(i * 37) for i in range(80)]
    collapses = measure_closed_collapse(items, new=numbers, old=["42"] * 80)
    assert {name: collapse.verdict for name, collapse in collapses.items()} == {"new": VARIED, "old": COLLAPSED}


def test_one_answer_that_is_right_everywhere_decides_nothing():
    items = build_items(check={"kind": "exact", "answers": ["no"]})
    collapses = measure_closed_collapse(items, new=["no"] * 80, old=["no"] * 40 + ["yes"] * 40)
    assert collapses["new"] == Collapse(NOT_MEASURED, ("“no” is right for every prompt",))
    schema = {"type": "object", "required": ["city"]}
    items = build_items(check={"kind": "json_schema", "schema": schema})
    texts = [f'{{"city": "{topic}"}}' for topic in TOPICS]
    assert measure_closed_collapse(items, new=texts, old=texts)["new"].verdict == NOT_MEASURED


def test_a_judge_that_scores_no_single_answer_and_several_turns_are_not_measured():
    turns = {"check": [None, {"kind": "exact", "answers": ["no"]}], "then": ("And now?",)}
    for items, reason in (
        (build_items(), "its judge scores no single answer"),
        (build_items(**turns), "several turns are scored"),
    ):
        collapses = measure_closed_collapse(items, new=["yes"] * 80, old=["no"] * 80)
        assert {collapse.verdict for collapse in collapses.values()} == {NOT_MEASURED}
        assert collapses["new"].reasons[0].startswith(f"equal answers may be right, and {reason}")


def test_the_lines_before_all_figures():
    collapsed = Collapse(COLLAPSED, ("on chat x",))
    unmeasured = Collapse(NOT_MEASURED, ("few",))
    assert describe_collapse({"new": collapsed, "a": unmeasured, "b": unmeasured, "c": Collapse(VARIED, ())}) == [
        "COLLAPSED: new: on chat x. The win rate below does not count as success.",
        "whether a or b collapsed is not measured: few",
    ]


def describe_gate(collapse: Collapse, **more: Any) -> str:
    fields = {"name": "g", "task": "asked", "is": "superior", "margin": 0.5, **more}
    (gate,) = parse_gates([fields], [EvalTask("asked", "a.jsonl")], ("new", "old"))
    decision = decide_gate(gate, [build_scored_task([1.0] * 80, [0.0] * 80)])
    return describe_decision(gate, decide_on_collapse(gate, decision, "new", collapse))


def test_gates_on_a_system_that_collapsed_fail_unless_told_otherwise():
    collapsed = Collapse(COLLAPSED, ("on chat x",))
    unmeasured = Collapse(NOT_MEASURED, ("few prompts",))
    varied = describe_gate(Collapse(VARIED, ()))
    assert varied.startswith("gate g: pass (")
    assert "collapsed" not in varied
    assert describe_gate(collapsed).startswith("gate g: fail (")
    assert describe_gate(collapsed).endswith("; new collapsed: on chat x)")
    assert describe_gate(collapsed, collapsed="measured").startswith("gate g: fail (")
    assert describe_gate(collapsed, collapsed=True) == varied
    assert describe_gate(unmeasured).startswith("gate g: pass (")
    assert describe_gate(unmeasured).endswith("; whether new collapsed is not measured: few prompts)")
    assert describe_gate(unmeasured, collapsed="measured").startswith("gate g: undecided (")
    assert describe_gate(Collapse(VARIED, ()), collapsed="measured") == varied
    rule = {"is": "not_worse", "against": "old", "margin": 0.05, "least_n": 200}
    line = describe_gate(unmeasured, **rule)
    assert line.endswith(
        "; 200 items would decide it, if the figure stays the same; whether new collapsed is not measured: few prompts)"
    )
    with pytest.raises(InputError, match="is not true, false or measured"):
        describe_gate(collapsed, collapsed="maybe")
