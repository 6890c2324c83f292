"""The page of several systems: its headline on gates, and how it shows the items of probes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from run_views import build_run_view

from align.core.types import Message
from align.evals.suite.probes import ChoiceQuestion, score_choices
from align.evals.suite.results import EvaluatedAnswer as Answer
from align.report.page import Report
from align.report.run_view import RunView
from align.report.suite_page import summarize_suite


@pytest.mark.parametrize(
    ("gates", "headline"),
    [
        (["pass"], "1 of 1 gate passed."),
        (["undecided"], "0 of 1 gate passed, 1 is undecided."),
        (["fail"], "0 of 1 gate passed, 1 failed."),
        (["pass", "undecided", "fail", "undecided"], "1 of 4 gates passed, 1 failed, 2 are undecided."),
    ],
)
def test_gates_that_did_not_pass_failed_or_are_undecided(gates: list[str], headline: str) -> None:
    run = build_suite_view(gates, {"tasks": None})
    assert summarize_suite(run) == f"{headline} No difference between new and old was shown."


def test_a_family_of_which_one_gate_is_enough_says_so() -> None:
    run = build_suite_view(["pass", "fail"], {"tasks": None, "gate_family": "any"})
    assert summarize_suite(run).startswith("1 of 2 gates passed, 1 failed; one is enough. ")


@pytest.mark.parametrize(
    ("level", "shown"), [(0.95, "0.100 [0.020, 0.180]"), (0.975, "0.100 [0.020, 0.180] at level 0.975")]
)
def test_an_interval_at_another_level_says_so(level: float, shown: str) -> None:
    figure = {"value": 0.1, "low": 0.02, "high": 0.18, "n": 100}
    gate = {"gate": "g", "verdict": "pass", "asked": "more", "figure": figure, "level": level, "n_to_decide": None}
    page = Report("t").add("overview", ["new", "old"], [], [gate], None, 0.95, template="suite.html").html()
    assert f"<td>{shown}</td>" in page


def build_suite_view(gates: list[str], evaluation: dict[str, Any]) -> RunView:
    compared = {"against": {"old": {"p_holm": 0.5}}, "role": "exact", "by": "checks"}
    metrics = {
        "systems": [{"name": "new"}, {"name": "old"}],
        "tasks": {"asked": compared},
        "gates": {f"g{i}": outcome for i, outcome in enumerate(gates)},
    }
    run = build_run_view("eval", metrics, settings={"level": 0.95})
    return replace(run, manifest=replace(run.manifest, config={**run.config, "eval": evaluation}))


def show_answer(answer: Answer) -> tuple[str, str]:
    """Return the label and the text that the page shows of an answer."""
    row = {"prompt": [{"role": "user", "content": "a question"}], "answers": dict.fromkeys("no", answer.as_dict())}
    report = Report("t").add("regressions", "n", "o", [row], False, template="suite.html")
    label, text = re.findall(r"<dt>n(.*?)</dt><dd><div dir=auto>(.*?)</div>", report.html(), re.DOTALL)[0]
    return label, text


def test_a_probe_shows_what_it_found() -> None:
    text = Answer("", "", -2.05021, weighed={"nats": 14.211, "tokens": 3, "bytes": 10})
    assert show_answer(text) == ("", "2.0502 bits per byte")
    for logprobs, label, chosen_text in (
        ([-1.0, -2.0], ", wrong choice", "Rome"),
        ([-2.0, -1.0], ", right choice", "Paris"),
    ):
        weighed = score_choices(ChoiceQuestion(("Rome", "Paris"), 1), logprobs)
        assert show_answer(Answer("", chosen_text, weighed["acc"], weighed=weighed)) == (label, chosen_text)
    assert show_answer(Answer("", "an answer", 0.5)) == (", score 0.50", "an answer")
    answer = Answer("", " 4\n#### 4", 1.0, weighed={"metrics": {"exact_match": 1.0}})
    assert show_answer(answer) == (", score 1.00", " 4\n#### 4")
    weighed = {"requests": [["Paris", -1.0]], "metrics": {"acc": 0.0}}
    assert show_answer(Answer("", "Paris", 0.0, weighed=weighed)) == (", score 0.00", "Paris")
    text = Answer("", "", -0.75, weighed={"requests": [], "metrics": {"bits_per_byte": -0.75}})
    assert show_answer(text) == ("", "-0.7500")
    before = (Message("assistant", "<b>"), Message("user", "more?"))
    assert show_answer(Answer("", "&", before=before)) == (
        "",
        "assistant: &lt;b&gt;\n\nuser: more?\n\nassistant: &amp;",
    )


def test_texts_whose_scores_are_nearly_equal_are_told_apart() -> None:
    answers = {
        who: Answer("", "", score, weighed={"nats": 1.0, "tokens": 1, "bytes": 1}).as_dict()
        for who, score in (("new", -2.0502), ("old", -2.0498))
    }
    row = {"prompt": [{"role": "user", "content": "a text"}], "answers": answers}
    page = Report("t").add("regressions", "new", "old", [row], False, template="suite.html").html()
    assert "2.0502 bits per byte" in page
    assert "2.0498 bits per byte" in page
    assert "(empty)" not in page
    assert "score" not in page.partition("Where new lost most against old:")[2]
