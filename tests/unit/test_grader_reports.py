"""Reports of graders: the answers that they are measured on, their figures, and the graders that may decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import CorruptFile, InputError
from align.core.types import Feedback, Message
from align.data.pairs import read_held_out_feedback
from align.data.sources import DataSource
from align.evals.judges.examples import AnswerExample, build_answer_examples, digest_examples
from align.evals.judges.figures import measure_judge_on_answers
from align.evals.judges.identity import JudgeIdentity
from align.evals.judges.opinions import JudgeOpinions
from align.evals.judges.report import explain_shortfall, read_report
from align.ops.calibration import SURE, compute_log_odds
from align.ops.intervals import proportion_interval


def build_feedback(prompt: str, answer: str, label: bool, id: str = "") -> Feedback:
    return Feedback((Message("user", prompt),), (Message("assistant", answer),), label, id)


def build_examples(*feedback: Feedback) -> list[AnswerExample]:
    return build_answer_examples(feedback)[0]


def test_an_answer_counts_once_and_most_labels_decide():
    examples, unclear = build_answer_examples(
        [
            build_feedback("q", "a", False, "1"),
            build_feedback("q", "a", True, "2"),
            build_feedback("q", "a", True, "3"),
            build_feedback("q", "b", False, "4"),
            build_feedback("r", "a", True, "4"),
            build_feedback("r", "c", True),
            build_feedback("r", "c", False),
        ]
    )
    assert [(example.item.id, example.label) for example in examples] == [("1", True), ("4", False), ("4#2", True)]
    assert unclear == 1, "as many yes as no"
    assert examples[0].item.cluster == examples[1].item.cluster != examples[2].item.cluster


def test_the_digest_is_of_what_was_labelled_and_not_of_its_order():
    rows = [build_feedback("q", "a", True, "1"), build_feedback("r", "b", False, "2")]
    digest = digest_examples(build_examples(*rows))
    assert (
        digest
        == digest_examples(build_examples(*rows[::-1]))
        == digest_examples(build_examples(build_feedback("q", "a", True, "9"), rows[1]))
    )
    changed_rows = [
        [build_feedback("q", "a", False), rows[1]],
        [build_feedback("q!", "a", True), rows[1]],
        [build_feedback("q", "a!", True), rows[1]],
        rows[:1],
    ]
    assert len({digest, *(digest_examples(build_examples(*changed)) for changed in changed_rows)}) == 5


def test_the_figures_of_ten_answers_by_hand():
    """Four of six answers labelled yes are judged right and one fails; three of four labelled no are judged right."""
    answers = build_examples(*(build_feedback(f"q{i}", "a", i < 6) for i in range(10)))
    scores = [1.0, 1.0, 1.0, 1.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0]
    odds = [None if score == 0.5 else compute_log_odds(abs(score - 0.2)) for score in scores]
    errors = ["?" if score == 0.5 else "" for score in scores]
    figures = measure_judge_on_answers(answers, JudgeOpinions(scores, None, odds, errors))
    assert figures["by_label"]["yes"] == proportion_interval([1, 1, 1, 1, 0, 0]).as_dict()
    assert figures["by_label"]["no"] == proportion_interval([1, 1, 1, 0]).as_dict()
    assert figures["agreement"]["raw"]["value"] == 0.7
    assert (figures["labels"], figures["said"], figures["errors"]) == ({"yes": 6, "no": 4}, {"yes": 5, "no": 4}, 1)
    right = 0.2**2
    wrong = 0.8**2
    assert figures["calibration"]["brier"]["value"] == pytest.approx((7 * right + 2 * wrong) / 9)
    assert figures["calibration"]["brier"]["n"] == 9
    assert "calibration" not in measure_judge_on_answers(
        answers, JudgeOpinions([1.0] * 10, None, [None] * 10, [""] * 10)
    )


def test_answers_of_one_prompt_are_one_piece_of_evidence():
    answers = build_examples(
        *(build_feedback("q", str(i), True) for i in range(9)),
        build_feedback("r", "a", True),
        build_feedback("s", "a", False),
    )
    figures = measure_judge_on_answers(answers, JudgeOpinions([*[1.0] * 9, 0.0, 0.0], None, [None] * 11, [""] * 11))
    assert figures["by_label"]["yes"]["n"] == 2
    assert figures["by_label"]["yes"]["value"] == 0.5


@pytest.mark.parametrize(("p", "odds"), [(0.5, 0.0), (0.75, 1.0986), (1.0, 20.723), (0.0, -20.723)])
def test_log_odds_are_bounded(p: float, odds: float):
    assert compute_log_odds(p) == pytest.approx(odds, abs=1e-3)
    assert 0 < SURE < 1e-6


GRADER = JudgeIdentity("m at http://h/v1", {"url": "http://h/v1", "asks": "Is it rude?"})
FIGURE = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 60}
WHOLE: dict[str, Any] = {
    "schema_version": 1,
    "judge": GRADER.as_dict(),
    "reference": "l.jsonl",
    "level": 0.95,
    "swap": None,
    "errors": 0,
    "agreement": {"raw": FIGURE, "kappa": FIGURE, "verdicts": 120},
    "by_label": {"yes": FIGURE, "no": FIGURE},
}


@pytest.mark.parametrize(
    ("label", "value", "low", "least", "why"),
    [
        ("no", 0.9, 0.8, 0.6, ""),
        ("no", 0.9, 0.8, 0.79, ""),
        ("yes", 0.9, 0.8, 0.8, "labelled yes is 0.90 [0.80"),
        ("no", 0.7, 0.6, 0.6, "labelled no is 0.70 [0.60, 0.95], whose lower end is not above 0.6"),
        ("no", 0.0, 0.0, 0.6, "it never says no where it should"),
        ("yes", 0.0, 0.0, 0.6, "it never says yes where it should"),
    ],
)
def test_both_labels_decide(tmp_path: Path, label: str, value: float, low: float, least: float, why: str):
    """The agreement over all answers does not decide: a grader that always says yes reaches the share labelled yes."""
    path = tmp_path / "card.json"
    by_label = {**WHOLE["by_label"], label: {**FIGURE, "value": value, "low": low}}
    for raw in (FIGURE, {**FIGURE, "low": 0.99}, {**FIGURE, "low": 0.1}):
        path.write_text(json.dumps({**WHOLE, "by_label": by_label, "agreement": {**WHOLE["agreement"], "raw": raw}}))
        shortfall = explain_shortfall(read_report(path), least)
        assert bool(shortfall) == bool(why)
        assert why in shortfall


@pytest.mark.parametrize(
    "change",
    [
        {"by_label": {}},
        {"by_label": {"yes": FIGURE}},
        {"by_label": None},
        {"by_label": {"yes": 1, "no": 1}},
        {"by_label": {"yes": FIGURE, "no": {**FIGURE, "low": float("nan")}}},
        {"judge": {**GRADER.as_dict(), "made_of": {"url": "http://h/v1"}}},
        {"judge": {**GRADER.as_dict(), "made_of": {**GRADER.made_of, "asks": "Is it kind?"}}},
    ],
)
def test_what_is_no_card_of_a_grader(tmp_path: Path, change: dict[str, Any]):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(WHOLE))
    assert read_report(path).as_dict()["agreement_by_label"] == {"yes": FIGURE, "no": FIGURE}
    path.write_text(json.dumps(WHOLE | change))
    with pytest.raises(CorruptFile, match="is not a judge's card"):
        read_report(path)


def test_labelled_answers_are_read_as_they_are_judged(tmp_path: Path):
    path = tmp_path / "l.jsonl"
    rows = [
        {"id": 7, "prompt": "q", "completion": "<think>\nhm\n</think>\n\na", "label": True},
        {"prompt": "q", "completion": "", "label": False},
        {"prompt": "q", "completion": "b", "label": "perhaps"},
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = DataSource("jsonl", str(path), system="Be kind.", hide_reasoning=True, skip_bad_rows=True)
    feedback = read_held_out_feedback(source)
    assert [(row.id, row.completion[0].content, row.label) for row in feedback] == [
        ("7", "a", True),
        ("l.jsonl:2", "", False),
    ]
    assert [turn.role for turn in feedback[0].prompt] == ["system", "user"]
    with pytest.raises(InputError, match="label=perhaps: is no label"):
        read_held_out_feedback(DataSource("jsonl", str(path)))
