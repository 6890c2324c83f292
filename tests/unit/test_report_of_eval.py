"""The page of an evaluation of one artifact: it begins with greedy answers of both sides."""

from __future__ import annotations

from pathlib import Path

from run_views import build_interval, build_run_view

from align.core.types import Message
from align.evals.suite.samples import Sample, write_samples
from align.report.live import build_finished_page


def build_page(folder: Path, greedy: list[tuple[str | None, str | None]]) -> str:
    """Build the page of an evaluation with these greedy answers of start and policy, one pair a prompt."""
    samples = [
        Sample(
            str(i),
            (Message("user", f"Question {i}?"),),
            f"sampled before {i}",
            f"sampled after {i}",
            0.0,
            1.0,
            5,
            2,
            True,
            True,
            1.0,
            greedy_ref=before,
            greedy_policy=after,
        )
        for i, (before, after) in enumerate(greedy)
    ]
    (folder / "artifact").mkdir()
    write_samples(folder / "artifact" / "samples.jsonl", samples)
    metrics = {
        "win_rate": build_interval(0.8, 0.7, 0.9, len(greedy)),
        "judge": "exact",
        "judge_is": "gold",
        "collapse": {"verdict": "varied"},
        "kl": 1.0,
    }
    return build_finished_page(build_run_view("eval", metrics, folder, settings={"shown": 1})).html()


def test_the_first_greedy_answers_follow_the_summary(tmp_path: Path) -> None:
    greedy: list[tuple[str | None, str | None]] = [(f"greedy before {i}", f"greedy after {i}") for i in range(9)]
    greedy[1] = (None, None)  # the second question with the text of an earlier one
    page = build_page(tmp_path, greedy)
    start = page.index(">Greedy answers</h2>")
    assert page.index("The policy wins") < start < page.index(">Inputs and settings</h2>")
    section = page[start : page.index(">Inputs and settings</h2>")]
    assert section.count("<figure>") == 6
    places = [section.index(f"greedy {side} {i}<") for i in (0, 2, 3, 4, 5, 6) for side in ("before", "after")]
    assert places == sorted(places)


def test_an_evaluation_on_few_prompts_has_no_greedy_answers(tmp_path: Path) -> None:
    assert "Greedy answers" not in build_page(tmp_path, [(None, None)] * 3)
