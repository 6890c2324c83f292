"""`stage=data` with scores: by a model's loss and by rewards, cut at quantiles of all rows, whatever interrupts it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_sets import chat, made, sources, three_sources, write
from workshop import Ready, Workshop, in_a_fork

from align.data.sets import score_cuts as scoring
from align.report.data_set_page import iter_losses

ALONE = ("stage.duplicates.exact=false", "stage.duplicates.near=null", "stage.contamination.test=false")
"""Nothing but scores leaves rows out."""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return three_sources(tmp_path)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in (folder / "artifact").glob("*.parquet") for row in pq.read_table(path).to_pylist()]


def by_loss(here: Path, model: Path, *words: str) -> list[str]:
    return [*sources(here), *ALONE, "device=cpu", "model=hub", f"model.path={model}", "stage.score.by=loss", *words]


def test_quantiles_of_the_loss_leave_out_the_rows_at_the_ends(here: Path, tiny_model: Path) -> None:
    folder, data, _ = made(here, *by_loss(here, tiny_model), "run.name=whole")
    every = rows_of(folder)
    assert all(math.isfinite(row["score"]) for row in every)
    assert "after_score" in data["sources"][0]["counts"]
    for within in ("source", "all"):
        words = by_loss(here, tiny_model, "stage.score.keep=[0.1,0.75]", f"stage.score.within={within}")
        cut, said, printed = made(here, *words, f"run.name={within}")
        groups = [[row for row in every if row["source"] == name] for name in ("support", "general")]
        expected = set[str]()
        for group in groups if within == "source" else [every]:
            order = sorted(group, key=lambda row: (row["score"], row["content_id"], row["row"]))
            expected |= {f"{r['source']}:{r['row']}"
                         for r in order[round(0.1 * len(order)) : round(0.75 * len(order))]}  # fmt: skip
        assert {f"{row['source']}:{row['row']}" for row in rows_of(cut)} == expected
        gone = sum(dict(iter_losses(source))["dropped by score"] for source in said["sources"])
        manifest = json.loads((cut / "manifest.json").read_text())
        assert len(every) - len(expected) == gone == manifest["metrics"]["dropped_by_score"]
        assert "dropped by score" in printed
    page = (cut / "report.html").read_text()
    assert "Scores of support" in page
    assert "kept, just above the lower cut" in page
    assert "Traceback" not in (cut / "log.txt").read_text()


def test_without_scores_nothing_speaks_of_them(here: Path) -> None:
    folder, data, _ = made(here, *sources(here))
    assert "scores" not in data
    assert "score" not in rows_of(folder)[0]
    assert not (folder / "scores.jsonl").exists()
    assert "after_score" not in data["sources"][0]["counts"]


def test_killed_while_it_scores_it_goes_on(here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE", 64)
    words = by_loss(here, tiny_model, "stage.score.keep=[0.1,0.75]")
    whole = made(here, *words, "run.name=whole")[1]
    read = scoring.load_records
    assert in_a_fork([*words, "run.name=killed"], deadly=["align.data.sets.score_cuts.load_records"], times=3) == -9
    [path] = (here / "runs" / "data" / "killed" / "checkpoints").glob(scoring.FILE)
    assert path.stat().st_size == 3 * 64 * 8
    asked = list[int]()
    monkeypatch.setattr(scoring, "load_records", lambda *given: (asked.append(len(given[-1])), read(*given))[1])
    _, again, printed = made(here, *words, "run.name=killed")
    assert "continues" in printed
    assert sum(asked) == sum(source["counts"]["kept"] for source in whole["sources"]) - 3 * 64
    assert (again["root"], again["scores"]) == (whole["root"], whole["scores"])


def test_personal_data_is_not_shown_beside_scores(tmp_path: Path) -> None:
    rows = [chat(f"Who is {i}?", f"Write to someone{i}@example.com, " + "x" * i) for i in range(9)]
    path = write(tmp_path / "rows.jsonl", rows)
    words = ["stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}", *ALONE]
    words += ["stage.clean=[{pii: {action: report}}]", "reward=sentiment", "stage.score.by=reward"]
    folder, _, _ = made(tmp_path, *words, "stage.score.keep=[0.2,0.9]")
    shown = (folder / "scores.jsonl").read_text()
    assert "[EMAIL]" in shown
    assert "@example.com" not in shown
    assert "@example.com" not in (folder / "report.html").read_text()


def test_a_function_scores_the_last_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_scores.py").write_text("def words(all):\n    return [len(c[-1]['content'].split()) for c in all]\n")
    rows = [chat(f"Question {i}?", " ".join([f"w{i}"] * (i + 1))) for i in range(20)]
    rows.append({"messages": [{"role": "user", "content": "Nobody answers?"}]})
    path = write(tmp_path / "rows.jsonl", rows)
    words = [
        "stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}", *ALONE,
        "reward=fn", "reward.fn=my_scores:words", "stage.score.by=reward", "stage.score.least=5", "stage.score.most=10",
    ]  # fmt: skip
    folder, data, printed = made(tmp_path, *words)
    found = {row["row"]: row["score"] for row in rows_of(folder)}
    assert found == {**{i: float(i) for i in range(5, 11)}, 21: None}
    assert data["scores"]["scorer"] == "my_scores:words"
    assert "1 row without a score" in printed
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    assert inputs["reward.fn"]["ref"] == "my_scores:words"


def test_a_reward_model_scores_pairs_by_their_difference(ready: Ready, tmp_path: Path) -> None:
    answers = ["Yes, until six in the evening.", "No.", "I do not know that.", "It is far away."]
    pairs = [
        {"prompt": f"Question {i // 4}?", "chosen": answers[i % 4], "rejected": answers[(i + 1) % 4]} for i in range(12)
    ]
    path = write(tmp_path / "pairs.jsonl", [*pairs, {**pairs[0], "chosen": "word " * 400}])
    words = ["stage=data", f"stage.sources=[{path}]", f"run.root={ready.root}", f"run.name={tmp_path.name}"]
    words += ["stage.score.by=reward", "reward.ref=reward:a", "device=cpu", *ALONE]
    folder, data, _ = made(tmp_path, *words)
    score_of_row = {row["row"]: row["score"] for row in rows_of(folder)}
    assert score_of_row[13] is None  # its chosen answer is longer than the model's context
    scores = [score_of_row[i] for i in range(1, 13)]
    assert len({round(score, 7) for score in scores}) > 3  # the model hardly learned, and still distinguishes answers
    assert max(map(abs, scores)) > 1e-5
    for first in (0, 4, 8):  # around a circle of four answers to one question
        assert sum(scores[first : first + 4]) == pytest.approx(0, abs=1e-6)
    assert data["scores"]["scorer"] == "reward:a"


def test_forgetting_keeps_the_scores_of_the_others(here: Path, tiny_model: Path) -> None:
    folder, _, _ = made(here, *by_loss(here, tiny_model), "run.name=old")
    before = {row["content_id"]: row["score"] for row in rows_of(folder)}
    gone = min(before)
    after, data, _ = made(
        here, "stage=data", "stage.action=forget", "data.path=data:old", f"stage.forget=[{gone}]",
        f"run.root={here / 'runs'}", "run.name=new",
    )  # fmt: skip
    assert {row["content_id"]: row["score"] for row in rows_of(after)} == {
        id: score for id, score in before.items() if id != gone
    }
    assert "scores" not in data
    assert not (here / "runs" / "data" / "old" / "scores.jsonl").exists()


def test_rows_that_are_not_scored(tmp_path: Path) -> None:
    shop = Workshop(tmp_path / "runs", tmp_path)
    for row, says in (
        ({"prompt": "q", "completion": "a", "label": True}, "answers with a label"),
        ({"text": "plain text"}, "finds nothing to score"),
    ):
        sources = f"stage.sources=[{write(tmp_path / 'rows.jsonl', [row] * 9)}]"
        shop.refuses("stage=data", sources, "reward=sentiment", "stage.score.by=reward", says=says)
