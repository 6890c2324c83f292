"""Several answers to each prompt: pass@k against an enumeration of all choices, and the commonest answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest

from align.core.types import Conversation, Message
from align.evals.suite.results import EvaluatedAnswer, ScoredTask, compute_system_figures, describe_task_results
from align.evals.suite.tasks import EvalItem, repeat_items
from align.ops.best_of_n import estimate_pass_at_k
from align.report.page import Report
from align.reward.checkers import build_checker

EXACT = {"kind": "exact", "answer": "4", "read": "last_number"}


@pytest.mark.parametrize("answers", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(answers: int) -> None:
    for right in range(answers + 1):
        flags = [True] * right + [False] * (answers - right)
        for k in range(1, answers + 1):
            choices = [any(choice) for choice in combinations(flags, k)]
            assert estimate_pass_at_k(right, answers, k) == pytest.approx(sum(choices) / len(choices))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_more_or_fewer_than_the_answers_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} is not from 1 to 4"):
        estimate_pass_at_k(2, 4, k)


def compute_figures(answers_by_prompt: Sequence[Sequence[str]], spec: dict[str, Any] = EXACT) -> dict[str, Any]:
    prompt = Conversation((Message("user", "2 + 2?"),))
    items = [EvalItem(f"p{i}", f"p{i}", "", prompt, spec) for i in range(len(answers_by_prompt))]
    items = repeat_items(items, len(answers_by_prompt[0]))
    check = build_checker(spec, "check")
    texts = [text for texts in answers_by_prompt for text in texts]
    answers = [EvaluatedAnswer("", text, check(text).score, checked=check(text)) for text in texts]
    task = ScoredTask("sums", "checks", "exact", items, {"new": answers})
    return compute_system_figures(task, "new", 0.95)


def test_shares_by_hand() -> None:
    """Three of the six pairs of answers to the first prompt hold the right one."""
    figures = compute_figures([["4", "5", "6", "7"], ["4"] * 4, ["5"] * 4])
    values = {share["k"]: share["value"] for share in figures["pass_at"]}
    assert values == pytest.approx({2: (0.5 + 1 + 0) / 3, 4: 2 / 3})
    assert figures["pass_at"][0]["n"] == 3
    assert figures["score"]["value"] == pytest.approx((0.25 + 1 + 0) / 3)


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["It is 4", "4", "5", "5."], 0.5),  # equally common
        (["4", "4", "5", "6"], 1.0),
        (["4", "5", "5", "6"], 0.0),
        (["", "", "4", "five"], 1.0),  # answers without a number have no vote
        (["", "five"], 0.0),
        (["4", "5", "6", "7"], 0.25),
        (["4", "4.0", "5", "5.0", "5.00"], 0.0),  # numbers are compared by their value
    ],
)
def test_the_commonest_answer(answers: list[str], share: float) -> None:
    assert compute_figures([answers])["majority"]["value"] == pytest.approx(share)


def test_other_checks_and_single_answers_have_no_majority() -> None:
    figures = compute_figures([["4", "5", "4"]], {"kind": "regex", "pattern": "4"})
    assert [share["k"] for share in figures["pass_at"]] == [2, 3]
    assert "majority" not in figures
    assert "pass_at" not in compute_figures([["4"], ["5"]])


def test_the_line_on_the_console() -> None:
    figures = compute_figures([["4", "5", "4", "4"]] * 20)
    figures["score"] = {"value": 0.75, "low": 0.7, "high": 0.8, "n": 20}
    task = {"role": "exact", "by": "checks", "against": {}, "dropped": 0, "items": 80, "systems": {"new": figures}}
    [score, line] = list(describe_task_results("new", "sums", task))
    assert score == "sums: new scores 0.750 [0.700, 0.800] on 80 items"
    assert line.startswith("sums: new, pass@2 1.000 [")
    assert ", pass@4 1.000 [" in line
    assert ", majority vote 1.000 [" in line


def test_the_table_of_the_page() -> None:
    figures = compute_figures([["4", "5", "4", "4"]] * 20)
    task = {"role": "exact", "by": "checks", "against": {}, "categories": {}, "systems": {"new": figures}}
    page = Report("t").add("task", "sums", ["new"], task, template="suite.html").html()
    table = page.partition("sums: several answers to each prompt")[2].partition("</table>")[0]
    cells = [re.sub(r"\[.*", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)]
    assert cells == ["new", "pass@2", "100\xa0%", "new", "pass@4", "100\xa0%", "new", "majority vote", "100\xa0%"]
