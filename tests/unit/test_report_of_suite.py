"""What the page of several systems says of gates, and of an item that a probe weighed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from seen_runs import seen

from align.evals.suite.probes import Choices, chosen
from align.evals.suite.results import Said as Answer
from align.report.page import Report
from align.report.page import Said as Side
from align.report.suite_page import regressions, side, summarize


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
    compared = {"against": {"old": {"p_holm": 0.5}}, "role": "exact", "by": "checks"}
    metrics = {
        "systems": [{"name": "new"}, {"name": "old"}], "tasks": {"asked": compared},
        "gates": {f"g{i}": outcome for i, outcome in enumerate(gates)},
    }  # fmt: skip
    run = seen("eval", metrics, settings={"level": 0.95})
    run = replace(run, manifest=replace(run.manifest, config={**run.config, "eval": {"tasks": None}}))
    assert summarize(run) == f"{headline} No difference between new and old was shown."


def test_a_probe_shows_what_it_found() -> None:
    text = Answer("", "", -2.05021, weighed={"nats": 14.211, "tokens": 3, "bytes": 10}).as_dict()
    assert side("new", text, False) == Side("new", "2.0502 bits per byte")
    for logprobs, label, picked in (
        ([-1.0, -2.0], "new, wrong choice", "Rome"),
        ([-2.0, -1.0], "new, right choice", "Paris"),
    ):
        weighed = chosen(Choices(("Rome", "Paris"), 1), logprobs)
        answer = Answer("", picked, weighed["acc"], weighed=weighed).as_dict()
        assert side("new", answer, False) == Side(label, picked)
    assert side("new", Answer("", "an answer", 0.5).as_dict(), False) == Side("new, score 0.50", "an answer")
    answer = Answer("", " 4\n#### 4", 1.0, weighed={"metrics": {"exact_match": 1.0}}).as_dict()
    assert side("new", answer, False) == Side("new, score 1.00", " 4\n#### 4")
    weighed = {"requests": [["Paris", -1.0]], "metrics": {"acc": 0.0}}
    assert side("new", Answer("", "Paris", 0.0, weighed=weighed).as_dict(), False) == Side("new, score 0.00", "Paris")
    text = Answer("", "", -0.75, weighed={"requests": [], "metrics": {"bits_per_byte": -0.75}}).as_dict()
    assert side("new", text, False) == Side("new", "-0.7500")


def test_texts_whose_scores_are_nearly_equal_are_told_apart() -> None:
    answers = {
        who: Answer("", "", score, weighed={"nats": 1.0, "tokens": 1, "bytes": 1}).as_dict()
        for who, score in (("new", -2.0502), ("old", -2.0498))
    }
    report = Report("t", "")
    regressions(report, "new", "old", [{"prompt": [{"role": "user", "content": "a text"}], "answers": answers}], False)
    page = report.html()
    assert "2.0502 bits per byte" in page
    assert "2.0498 bits per byte" in page
    assert "(empty)" not in page
    assert "score" not in page.partition("Where new lost most against old:")[2]
